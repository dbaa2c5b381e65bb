"""The server under load that misbehaves: does it stay up, right, and as small as it was?

    python benchmarks/serve_load.py [--minutes 5] [--clients 64] [--target toy] [--draft lookup]
    python benchmarks/serve_load.py --target smollm2-135m --minutes 1 --clients 16 --out load.json

Starts `dspark serve` in exact mode and asks it questions whose answers were computed before, by
`Engine.generate` in this process with plain decoding. Clients take whole answers and streams, go
away in the middle or before the first byte, read slowly, send bodies that are too large, that are
no JSON, or that ask for what there is not. At the end the same questions are asked once more in the
same order, so that the K/V pages kept for sharing must be those of the beginning, and kill -TERM
comes while streams run: they must end well, and the server with status 0.

It counts as a violation (exit status 3): an answer that is not the engine's, a stream that breaks
off, a status that was not due (429 is, and is counted), pages that are missing, memory that grew by
more than 10 % and 32 MiB between the second and the last quarter of the time, a server that dies or
does not drain. `--target toy` is a random two-layer model, made in a temporary folder.

Prints one table; --out keeps it as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import describe, finish

import dspark

CHAT = "/v1/chat/completions"
SUBJECTS = ("rivers", "bread", "the moon", "trains", "salt", "music", "bees", "glass")
MAX_BODY = 64 << 10
GROWTH, SLACK = 1.10, 32 << 20


class ServerGoneError(Exception):
    """The connection was refused or broke off."""


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        body: What is asked.
        text: What must come.
        reason: Why it must end.
    """

    body: dict[str, Any]
    text: str
    reason: str


@dataclass
class Tally:
    """What happened.

    Attributes:
        done: By kind of action.
        busy: Answers with status 429.
        violations: What must not happen, in words.
        tokens: Tokens of answers that were compared.
        samples: (seconds, resident bytes, pages, running, waiting).
    """

    done: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    violations: list[str] = field(default_factory=list)
    tokens: int = 0
    samples: list[tuple[float, float, float, float, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, tokens: int = 0) -> None:
        """Count an action."""
        with self.lock:
            self.done[kind] += 1
            self.tokens += tokens

    def blame(self, what: str) -> None:
        """Note a violation."""
        with self.lock:
            self.violations.append(what)


class Client:
    """One client, which does something at random again and again.

    Args:
        port: Where the server listens.
        questions: What may be asked.
        tally: What happened.
        seed: Of its choices.
    """

    def __init__(self, port: int, questions: list[Question], tally: Tally, seed: int) -> None:
        self._port = port
        self._questions = questions
        self._tally = tally
        self._rng = random.Random(seed)  # noqa: S311 - choices of a load, no secret
        self._actions: dict[str, tuple[int, Callable[[], None]]] = {
            "whole answers": (30, self.take_whole),
            "streams": (30, lambda: self.take_stream(0.0)),
            "slow readers": (6, lambda: self.take_stream(0.05)),
            "gone in a stream": (14, self.leave_stream),
            "gone before the answer": (6, self.leave_early),
            "bodies too large": (4, self.send_large),
            "bodies that are no JSON": (5, self.send_junk),
            "wishes refused": (5, self.wish_wrongly),
        }

    def work(self, end: float) -> None:
        """Act until the time is over."""
        names = list(self._actions)
        weights = [weight for weight, _ in self._actions.values()]
        while time.monotonic() < end:
            (name,) = self._rng.choices(names, weights)
            try:
                self._actions[name][1]()
            except (OSError, http.client.HTTPException, ServerGoneError) as exc:
                self._tally.blame(f"{name}: {type(exc).__name__}: {exc}")
                time.sleep(0.5)

    @contextmanager
    def _sent(self, body: bytes) -> Iterator[http.client.HTTPConnection]:
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        link.request("POST", CHAT, body, {"Content-Type": "application/json"})
        try:
            yield link
        finally:
            link.close()

    def _is_busy(self, reply: http.client.HTTPResponse) -> bool:
        if reply.status != 429:
            return False
        with self._tally.lock:
            self._tally.busy += 1
        time.sleep(self._rng.uniform(0.2, 1.0))
        return True

    def take_whole(self) -> None:
        """Take a whole answer and compare it."""
        question = self._rng.choice(self._questions)
        with self._sent(json.dumps(question.body).encode()) as link:
            reply = link.getresponse()
            if self._is_busy(reply):
                return
            value = json.loads(reply.read())
        if reply.status != 200:
            self._tally.blame(f"status {reply.status}: {value}")
            return
        (choice,) = value["choices"]
        self._compare(question, choice["message"]["content"], choice["finish_reason"])
        self._tally.note("whole answers", value["usage"]["completion_tokens"])

    def take_stream(self, pause: float) -> None:
        """Take a stream, with pauses between its events, and compare it."""
        question = self._rng.choice(self._questions)
        with self._sent(json.dumps({**question.body, "stream": True}).encode()) as link:
            reply = link.getresponse()
            if self._is_busy(reply):
                return
            text, reason, is_whole, count = "", None, False, 0
            for event in events_of(reply):
                if event is None:
                    is_whole = True
                    break
                if "error" in event:
                    self._tally.blame(f"error in a stream: {event['error']['message']}")
                    return
                count += 1
                text += event["choices"][0]["delta"].get("content", "")
                reason = event["choices"][0]["finish_reason"] or reason
                time.sleep(pause)
        if not is_whole:
            self._tally.blame("a stream ended without [DONE]")
            return
        self._compare(question, text, reason)
        self._tally.note("slow readers" if pause else "streams", count)

    def _compare(self, question: Question, text: str, reason: str | None) -> None:
        if (text, reason) != (question.text, question.reason):
            self._tally.blame(f"another text: {text[:40]!r} for {question.text[:40]!r}")

    def leave_stream(self) -> None:
        """Go away in the middle of a stream."""
        question = self._rng.choice(self._questions)
        with self._sent(json.dumps({**question.body, "stream": True}).encode()) as link:
            reply = link.getresponse()
            if self._is_busy(reply):
                return
            for _ in zip(range(self._rng.randint(1, 12)), events_of(reply), strict=False):
                pass
        self._tally.note("gone in a stream")

    def leave_early(self) -> None:
        """Go away before the answer begins."""
        question = self._rng.choice(self._questions)
        is_stream = self._rng.random() < 0.5
        with self._sent(json.dumps({**question.body, "stream": is_stream}).encode()):
            time.sleep(self._rng.uniform(0, 0.3))
        self._tally.note("gone before the answer")

    def send_large(self) -> None:
        """Send a body over the limit."""
        body = json.dumps({"messages": [], "user": "x" * (MAX_BODY + 5000)}).encode()
        self._expect(body, 413, "bodies too large")

    def send_junk(self) -> None:
        """Send a body that is no JSON object."""
        junk = (b"{", b"[]", b"\xff", b'{"messages": NaN}', b'{"a":' * 2000)
        self._expect(self._rng.choice(junk), 400, "bodies that are no JSON")

    def wish_wrongly(self) -> None:
        """Ask for what there is not."""
        base = self._rng.choice(self._questions).body
        wishes = ({"temperature": -1}, {"n": 0}, {"audio": {}}, {"stop": 5}, {"messages": {}})
        body = json.dumps({**base, **self._rng.choice(wishes)}).encode()
        self._expect(body, 400, "wishes refused")

    def _expect(self, body: bytes, status: int, kind: str) -> None:
        with self._sent(body) as link:
            reply = link.getresponse()
            value = json.loads(reply.read())
        if reply.status != status or "error" not in value:
            self._tally.blame(f"{kind}: status {reply.status}")
        self._tally.note(kind)


def events_of(reply: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream; None for [DONE]."""
    if reply.status != 200:
        raise ServerGoneError(f"status {reply.status} for a stream")
    while line := reply.readline():
        text = line.decode().strip()
        if text.startswith("data: "):
            data = text.removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)


# -- model and answers ------------------------------------------------------------------------


def make_toy(folder: Path) -> None:
    """Keep a random model and a tokenizer of bytes in a folder."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = {"bos_token": "<s>", "eos_token": "</s>"}
    vocab = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)


def make_questions(args: argparse.Namespace, target: str) -> list[Question]:
    """Questions and what the engine answers to them alone, decoding plainly."""
    engine = dspark.Engine.load(target, "none", exact=True, threads=args.threads)
    bodies = []
    for number in range(args.questions):
        words = f"{number}: say something about {SUBJECTS[number % len(SUBJECTS)]}."
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": args.tokens // 2 + number * args.tokens // args.questions,
            "temperature": (0.0, 0.8)[number % 2],
            "seed": number,
        }
        bodies.append(body)
    names = ("max_tokens", "temperature", "seed")
    params = [dspark.SamplingParams(**{name: body[name] for name in names}) for body in bodies]
    if engine.sampling_defaults:  # the server would use them for what is not said
        raise SystemExit("this target has sampling defaults of its own: take another one")
    results = engine.generate([body["messages"] for body in bodies], params)
    pairs = zip(bodies, results, strict=True)
    return [Question(body, r.text, r.finish_reason.value) for body, r in pairs]


# -- the server -------------------------------------------------------------------------------


class Server:
    """`dspark serve` in a process.

    Args:
        args: The settings.
        target: The target.
        log: Where its standard error goes.
    """

    def __init__(self, args: argparse.Namespace, target: str, log: Path) -> None:
        command = [sys.executable, "-c", "from dspark.cli import main; main()", "serve"]
        command += ["--target", target, "--draft", args.draft, "--port", "0", "--exact"]
        command += ["--name", "load", "--max-body", str(MAX_BODY), "--drain-seconds", "60"]
        command += ["--max-batch", str(args.max_batch), "--max-queue", str(args.max_queue)]
        if args.threads is not None:
            command += ["--threads", str(args.threads)]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        line = self.process.stdout.readline() if self.process.stdout else ""
        if " at http://" not in line:
            raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
        self.port = int(line.split(" at http://")[1].split()[0].rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        """Values of /metrics that have one."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request("GET", "/metrics")
        text = link.getresponse().read().decode()
        link.close()
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] = float(value)
        return found

    def sample(self, tally: Tally, end: float) -> None:
        """Note memory and load until the time is over."""
        start = time.monotonic()
        while time.monotonic() < end:
            try:
                now = self.metrics()
            except (OSError, http.client.HTTPException) as exc:
                tally.blame(f"/metrics: {type(exc).__name__}: {exc}")
                return
            tally.samples.append((time.monotonic() - start, *_figures(now)))
            time.sleep(1.0)


def _figures(now: dict[str, float]) -> tuple[float, float, float, float]:
    names = ("process_resident_memory_bytes", "dspark:cache_pages")
    loads = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    rss, pages, running, waiting = (now[name] for name in names + loads)
    return rss, pages, running, waiting


def pages_of_all(server: Server, client: Client, questions: list[Question]) -> float:
    """Ask all questions in order, one at a time, and say how many pages are in use then."""
    client._questions, before = questions, client._questions
    for question in questions:
        client._questions = [question]
        client.take_whole()
    client._questions = before
    end = time.monotonic() + 60
    while time.monotonic() < end:
        _, pages, running, waiting = _figures(server.metrics())
        if not running and not waiting:
            break
        time.sleep(0.2)
    return pages


def drain(server: Server, questions: list[Question], tally: Tally) -> float:
    """Send SIGTERM while streams run; returns the seconds until the server has ended."""
    clients = [Client(server.port, [q], tally, seed) for seed, q in enumerate(questions[:8])]
    threads = [threading.Thread(target=client.take_stream, args=(0.0,)) for client in clients]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while not _figures(server.metrics())[2] and time.monotonic() < end:
        time.sleep(0.02)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    try:
        status = server.process.wait(90)
    except subprocess.TimeoutExpired:
        tally.blame("the server did not end after SIGTERM")
        server.process.kill()
        return time.monotonic() - start
    if status != 0:
        tally.blame(f"the server ended with status {status}")
    return time.monotonic() - start


def check_memory(tally: Tally) -> dict[str, float]:
    """Compare the memory of the second and the last quarter of the time."""
    rss = [sample[1] for sample in tally.samples]
    quarter = len(rss) // 4
    if quarter < 2:
        return {}
    early, late = (statistics.median(part) for part in (rss[quarter : 2 * quarter], rss[-quarter:]))
    if late > early * GROWTH and late > early + SLACK:
        tally.blame(f"memory grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")
    return {"MiB in the second quarter": early / 2**20, "MiB in the last quarter": late / 2**20}


def run(args: argparse.Namespace, folder: Path) -> tuple[Tally, dict[str, float]]:
    """Put the server under load."""
    target = args.target
    if target == "toy":
        target = str(folder / "toy")
        make_toy(folder / "toy")
    print("computing the answers", file=sys.stderr)
    questions = make_questions(args, target)
    print("starting the server", file=sys.stderr)
    tally, server = Tally(), Server(args, target, folder / "server.log")
    first = Client(server.port, questions, tally, 0)
    pages_of_all(server, first, questions)  # what is kept is the same from the second time on
    before = pages_of_all(server, first, questions)
    start, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    clients = [Client(server.port, questions, tally, seed) for seed in range(args.clients)]
    threads = [threading.Thread(target=client.work, args=(end,)) for client in clients]
    threads.append(threading.Thread(target=server.sample, args=(tally, end)))
    for thread in threads:
        thread.start()
    try:
        while time.monotonic() < end and server.process.poll() is None:
            time.sleep(5)
            left = max(0.0, end - time.monotonic())
            total = sum(tally.done.values())
            print(
                f"{total} actions, {len(tally.violations)} violations, {left:.0f} s left",
                file=sys.stderr,
            )
    finally:
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - start
    after = pages_of_all(server, first, questions)
    if after != before:
        tally.blame(f"{before:.0f} pages before, {after:.0f} after")
    figures = {
        "seconds": seconds,
        "compared tokens or events per second": tally.tokens / seconds,
        "most choices running": max((s[3] for s in tally.samples), default=0.0),
        "most choices waiting": max((s[4] for s in tally.samples), default=0.0),
        "pages before": before,
        "pages after": after,
        "most pages": max((s[2] for s in tally.samples), default=0.0),
        **check_memory(tally),
        "seconds to drain": drain(server, questions, tally),
    }
    return tally, figures


def main() -> None:
    """Run the load and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--target", default="toy")
    parser.add_argument("--draft", default="lookup")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer, about")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally, figures = run(args, Path(folder))
    for name, count in sorted(tally.done.items()):
        print(f"{name:<40} {count:>10}")
    print(f"{'refused as too many (429)':<40} {tally.busy:>10}")
    for name, value in figures.items():
        print(f"{name:<40} {value:>10.1f}")
    print(f"{'violations':<40} {len(tally.violations):>10}")
    for what, count in Counter(tally.violations).most_common(10):
        print(f"  {count} x {what}")
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        report = {"schema": 1, "run": describe(), "settings": settings, "done": tally.done}
        more = {"busy": tally.busy, "figures": figures, "violations": tally.violations}
        more["samples"] = tally.samples
        finish({**report, **more}, args.out)
    if tally.violations:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
