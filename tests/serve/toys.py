"""Small engines behind real HTTP, for the tests of dspark.serve."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
import uvicorn.server
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import dspark
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.registry import LoadOptions
from dspark.serve.desk import Desk
from dspark.serve.run import Server, bind, make_server
from dspark.serve.settings import ServeConfig
from dspark.target import TargetOutput
from dspark.text import TextCodec
from tests.conftest import VOCAB, random_model
from tests.eval.toys import VOCAB as SCRIPT_VOCAB
from tests.eval.toys import ToyTarget
from tests.paged_toy import PagedTarget

SPECIAL = ["<pad>", "<s>", "</s>"]
CHARACTERS = [c for c in (chr(i) for i in range(32, 127)) if c not in "~^`"] + ["\n"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}: "
    "{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer whose tokens are single characters."""
    spelt = [c.replace(" ", "\u0120").replace("\n", "\u010a") for c in CHARACTERS]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *spelt])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    out.chat_template = TEMPLATE
    return out


class _Impatient:
    """`asyncio` as uvicorn sees it, whose waits of tenths of a second are shorter."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


uvicorn.server.asyncio = _Impatient()  # type: ignore[assignment]


class TextTarget(PagedTarget):
    """A target with pages whose logits hang on the last two characters.

    Args:
        table: [VOCAB * VOCAB, VOCAB].
        name: What it is called; models from folders are called by their paths.
        max_positions: Its context.
    """

    def __init__(
        self,
        table: torch.Tensor,
        name: str = "/secret/folder/toy-model",
        *,
        max_positions: int = 512,
    ) -> None:
        super().__init__(table)
        facts = {"name": name, "vocab_size": VOCAB, "max_positions": max_positions}
        self.info = dataclasses.replace(self.info, **facts, eos_token_ids=(2,))
        self.broken: list[Exception] = []
        self.pause = 0.0

    def forward(self, batch: Any, cache: Any, *, capture: Any = ()) -> TargetOutput:
        if self.broken:
            raise self.broken.pop()
        time.sleep(self.pause)
        before = np.zeros(batch.num_rows, dtype=np.int64)
        for span in batch.spans:
            own = slice(span.start, span.stop)
            committed, parents = cache.committed[span.slot], batch.parent[own]
            last = committed[-1] if committed else 0
            before[own] = np.where(parents < 0, last, batch.token_ids[parents])
            local = np.where(parents < 0, -1, parents - span.start).tolist()
            cache.last[span.slot] = (batch.token_ids[own].tolist(), local)
        rows = (before * VOCAB + batch.token_ids)[batch.output_rows]
        return TargetOutput(self.table[torch.from_numpy(rows)])


@functools.cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(11)
    table = (rng.normal(size=(VOCAB * VOCAB, VOCAB)) * 2.0).astype(np.float32)
    table[:, 0] = table[:, 1] = -20.0  # no padding and no beginning in the middle of a text
    other = 0.9 * table + 0.7 * rng.normal(size=table.shape).astype(np.float32)
    return torch.from_numpy(table), torch.from_numpy(other)


def toy_engine(
    *, sampling: dict[str, float] | None = None, max_batch: int = 32, max_positions: int = 512
) -> dspark.Engine:
    """A fast engine over characters, with a draft that is right now and then."""
    assert len(SPECIAL) + len(CHARACTERS) == VOCAB
    table, other = _tables()
    draft = ModelDrafter(TextTarget(other, "draft"), vocab_size=VOCAB)
    return dspark.Engine(
        TextTarget(table, max_positions=max_positions),
        drafter=draft,
        codec=TextCodec(tokenizer()),
        config=dspark.EngineConfig(auto_off=False, schedule="off", max_batch=max_batch),
        sampling_defaults=sampling,
    )


def llama_engine() -> dspark.Engine:
    """A random Llama with a real cache."""
    model = random_model("llama", layers=2)
    adapter = adapter_for(model.config.model_type)
    target = wrap_model(model, adapter, LoadOptions(name="toy", exact=False), eos_token_ids=(2,))
    return dspark.Engine(target, drafter=LookupDrafter(), codec=TextCodec(tokenizer()))


def script_engine(pieces: Sequence[str], *, template: str, special: Sequence[str] = ()) -> Any:
    """An engine that answers every prompt with these pieces, one token each, all different."""
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL[1:]])
    hidden = set(special)
    backend.add_tokens([AddedToken(piece, special=piece in hidden) for piece in pieces])
    names = dict(zip(("bos_token", "eos_token"), SPECIAL[1:], strict=True))
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    own.chat_template = template
    assert len(own) <= SCRIPT_VOCAB
    script = [1, *(own.convert_tokens_to_ids(piece) for piece in pieces), 2]
    table = torch.zeros(SCRIPT_VOCAB, SCRIPT_VOCAB, SCRIPT_VOCAB)
    for here, after in itertools.pairwise(script):
        table[:, here, after] = 20.0
    target = ToyTarget(table.reshape(-1, SCRIPT_VOCAB))
    target.info = dataclasses.replace(target.info, eos_token_ids=(2,))
    config = dspark.EngineConfig(auto_off=False, schedule="fixed:4")
    return dspark.Engine(target, drafter=LookupDrafter(), codec=TextCodec(own), config=config)


@dataclass
class Running:
    """A server under test.

    Attributes:
        engine: Its engine; only its thread may touch it.
        server: uvicorn's side.
        port: Where it listens.
    """

    engine: dspark.Engine
    server: Server
    port: int

    @property
    def desk(self) -> Desk:
        return self.server._desk

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Send a request; returns status, body (JSON if it is), headers."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {} if data is None else {"Content-Type": "application/json"}
        link.request(
            method or ("GET" if data is None else "POST"), path, data, sent | (headers or {})
        )
        reply = link.getresponse()
        text = reply.read()
        link.close()
        found = {name.lower(): value for name, value in reply.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(text) if is_json else text.decode(), found

    def chat(self, **fields: Any) -> Any:
        """Ask for a chat completion that must succeed."""
        body = {"model": "toy", "messages": [{"role": "user", "content": "Hello"}], **fields}
        status, answer, _ = self.ask("/v1/chat/completions", body)
        assert status == 200, answer
        return answer

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream; the last one must be [DONE], which is left out."""
        status, text, headers = self.ask(path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"].startswith("text/event-stream")
        blocks = text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs any more."""
        worker = self.desk.worker
        wait_for(lambda: not (worker._jobs or self.engine.num_unfinished), seconds)


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(
    engine: dspark.Engine, *, send_buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    """A server in a thread, stopped at the end.

    Args:
        engine: Its engine.
        send_buffer: Bytes that the system keeps for a client that does not read, about.
        settings: Of `ServeConfig`.
    """
    config = ServeConfig(**{"model": "toy", "drain_seconds": 5.0, **settings})
    place = bind("127.0.0.1", 0)
    if send_buffer is not None:  # connections inherit it
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready = threading.Event()
    server = make_server(engine, config, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        assert ready.wait(20)
        yield Running(engine, server, place.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
