"""Engines of other projects, each in a process and an environment of its own.

    OTHER/bin/python benchmarks/engines.py llama-cpp '{"model": "x.gguf", "threads": 2, ...}'

The process loads one engine and then answers one line of JSON by another, so it computes only when
it is asked to. Nothing of dspark is imported here: the other environment has none of it. Without
arguments it does nothing; `table.py` starts it.

What is asked: {"mode": "plain", "prompts": [[token, ...]], "together": false, "tokens": 128,
"stop": [token, ...]}. What is answered: {"seconds": s, "texts": [[token, ...]], "idle": CPU seconds
since the answer before}.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO, cast

__all__ = ["Child", "LlamaCpp", "Vllm", "serve"]

Texts = list[list[int]]


class Child:
    """An engine in another process.

    Args:
        python: Interpreter of the environment that has it.
        kind: A name of `KINDS`.
        options: For its class.
        threads: For its libraries.

    Attributes:
        about: What it says of itself: version, seconds of the start.
        idle: CPU seconds that it took while nothing was asked, over all runs.
    """

    def __init__(self, python: str, kind: str, options: dict[str, Any], threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its worker processes spin while they wait
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python, __file__, kind, json.dumps({**options, "threads": threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._requests = cast(TextIO, self._process.stdin)
        self._answers = cast(TextIO, self._process.stdout)
        self.kind = kind
        self.idle = 0.0
        self.about = {**self._read(), "start s": round(time.perf_counter() - start, 1)}

    def run(self, **request: Any) -> tuple[float, Texts]:
        """Seconds and texts of one request."""
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        answer = self._read()
        self.idle += answer["idle"]
        return answer["seconds"], answer["texts"]

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaCpp:
    """llama-cpp-python: its low-level calls for plain decoding, its own lookup by `Llama`.

    Args:
        model: GGUF file.
        threads: For steps and prompts.
        batch: Sequences at once.
        context: Tokens of one sequence at the most.
    """

    def __init__(self, model: str, threads: int, batch: int, context: int) -> None:
        import llama_cpp
        import numpy
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.lib, self.numpy = llama_cpp, numpy
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts = {size: self._context(size, context, threads) for size in (1, batch)}
        self.lookup = llama_cpp.Llama(
            model,
            n_ctx=context,
            logits_all=True,  # lookup needs the logits of drafted positions
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10),
            verbose=False,
        )
        self.about = {
            "llama-cpp-python": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def _context(self, size: int, length: int, threads: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = size * length
        params.n_batch = max(length, size)
        params.n_seq_max = size
        params.n_threads = params.n_threads_batch = threads
        return self.lib.llama_init_from_model(self.model, params)

    def run(self, mode: str, prompts: Texts, tokens: int, stop: set[int]) -> Texts:
        """Greedy texts of prompts that are decoded together."""
        if mode == "lookup":
            return [self._look_up(prompt, tokens, stop) for prompt in prompts]
        context = self.contexts[len(prompts)]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), False)
        texts: Texts = []
        for sequence, prompt in enumerate(prompts):
            rows = [(token, place, sequence) for place, token in enumerate(prompt)]
            texts.append(self._step(context, rows, [len(rows) - 1]))
        while True:
            going = [n for n, t in enumerate(texts) if len(t) < tokens and t[-1] not in stop]
            if not going:
                return texts
            rows = [(texts[n][-1], len(prompts[n]) + len(texts[n]) - 1, n) for n in going]
            made = self._step(context, rows, list(range(len(rows))))
            for sequence, token in zip(going, made, strict=True):
                texts[sequence].append(token)

    def _step(self, context: Any, rows: list[tuple[int, int, int]], asked: list[int]) -> list[int]:
        """Likeliest tokens after some rows (token, position, sequence) of a forward."""
        batch = self.lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = row in asked
        failed = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed} for {len(rows)} rows")
        shape = (self.words,)
        logits = [self.lib.llama_get_logits_ith(context, row) for row in asked]
        return [int(self.numpy.ctypeslib.as_array(x, shape).argmax()) for x in logits]

    def _look_up(self, prompt: list[int], tokens: int, stop: set[int]) -> list[int]:
        self.lookup.reset()  # or it would keep the prompt from the turn before
        text: list[int] = []
        for token in self.lookup.generate(prompt, temp=0.0):
            text.append(token)
            if len(text) == tokens or token in stop:
                return text
        return text


class Vllm:
    """vLLM's engine in this process.

    Args:
        model: Folder of the checkpoint.
        threads: Handed over by OMP_NUM_THREADS.
        batch: Requests at once.
        context: Tokens of one request at the most.
        dtype: Of weights and arithmetic.
        is_eager: Without torch.compile.
    """

    def __init__(
        self, model: str, threads: int, batch: int, context: int, dtype: str, is_eager: bool
    ) -> None:
        import torch
        import vllm

        torch.set_num_threads(threads)
        self.lib = vllm
        self.engine = vllm.LLM(
            model,
            dtype=dtype,
            enforce_eager=is_eager,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # or it would keep prompts from the turn before
            max_model_len=context,
            max_num_seqs=batch,
            kv_cache_memory_bytes=2**30,
        )
        self.about = {"vllm": vllm.__version__, "dtype": dtype, "eager": is_eager}

    def run(self, mode: str, prompts: Texts, tokens: int, stop: set[int]) -> Texts:
        """Greedy texts of prompts that are decoded together."""
        if mode != "plain":
            raise ValueError(f"mode is {mode!r}, but must be 'plain'")
        params = self.lib.SamplingParams(
            temperature=0.0, max_tokens=tokens, stop_token_ids=sorted(stop), detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self.engine.generate(requests, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


KINDS: dict[str, Callable[..., Any]] = {"llama-cpp": LlamaCpp, "vllm": Vllm}


def serve(engine: Any, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until they end."""

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(**engine.about)
    before = time.process_time()
    for line in requests:
        asked = json.loads(line)
        idle = time.process_time() - before
        prompts, stop = asked["prompts"], set(asked["stop"])
        batches = [prompts] if asked["together"] else [[prompt] for prompt in prompts]
        texts: Texts = []
        start = time.perf_counter()
        for batch in batches:
            texts += engine.run(asked["mode"], batch, asked["tokens"], stop)
        seconds = time.perf_counter() - start
        answer(seconds=seconds, texts=texts, idle=idle)
        before = time.process_time()


def main() -> None:
    """Load the engine that the command line names, and serve it."""
    if len(sys.argv) != 3:
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    serve(KINDS[sys.argv[1]](**json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":
    main()
