"""A small target and a draft that was really fitted to it, so that its settings matter."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.adapters.hf.target import HFTarget
from dspark.cache import Cache
from dspark.draft.backbone import attend_rows
from dspark.draft.base import DraftContext, Drafter
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.dspark_module import DSparkModule
from dspark.eval.doctor.exam import DoctorConfig
from dspark.eval.doctor.findings import DoctorReport
from dspark.eval.doctor.patient import Patient
from dspark.eval.doctor.run import diagnose
from dspark.eval.doctor.text_checks import Asked
from dspark.eval.doctor.traces import Trace, add_states, write_traces
from dspark.target import TargetOutput, TokenBatch
from dspark.tree import Proposal
from tests.conftest import random_target
from tests.draft.dspark_models import VOCAB, make_module

LAYERS = (0, 1)
BLOCK = 4
MASK = 4
MAX_TOKENS = 32
STEPS = 32


def asked(count: int = 5) -> list[Asked]:
    """Prompts of token ids."""
    generator = torch.Generator().manual_seed(5)
    return [
        Asked(
            question_id=i,
            category="toy",
            token_ids=tuple(torch.randint(5, VOCAB, (12,), generator=generator).tolist()),
        )
        for i in range(count)
    ]


def target() -> HFTarget:
    return random_target("llama", exact=True, layers=4)


@functools.cache
def texts(count: int = 5) -> list[Trace]:
    """What the target writes after the prompts, with the states that the draft reads."""
    prompts = [(own.question_id, own.category, own.token_ids) for own in asked(count)]
    traces = write_traces(target(), None, prompts, max_tokens=MAX_TOKENS)
    return add_states(target(), traces, LAYERS)


def block_logits(module: DSparkModule, trace: Trace, anchors: Sequence[int]) -> Tensor:
    """Base logits [anchors, block, V] of the blocks at these positions, all at once."""
    slots, count = module.config.block_size, len(anchors)
    states = torch.cat([trace.states[layer] for layer in module.config.target_layer_ids], dim=-1)
    size = states.shape[0]
    context = module.context(module.combine(states.clone()), torch.arange(size))
    tokens = torch.full((count, slots), module.config.mask_token_id)
    tokens[:, 0] = torch.tensor([trace.tokens[at] for at in anchors])
    positions = torch.tensor(anchors)[:, None] + torch.arange(slots)
    before = torch.arange(size)[None] < torch.tensor(anchors).repeat_interleave(slots)[:, None]
    own = torch.block_diag(*[torch.ones(slots, slots)] * count).bool()
    mask = torch.cat([before, own], dim=1)

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        key, value = (
            torch.cat([old, new]).transpose(0, 1)
            for old, new in zip(context[layer], (keys, values), strict=True)
        )
        return attend_rows(queries, key, value, mask)

    hidden = module.block(module.embed(tokens.flatten()), positions.flatten(), attend)
    return module.base_logits(hidden).view(count, slots, -1)


@functools.cache
def fitted(steps: int = STEPS, count: int = 5) -> DSparkModule:
    """A DFlash-like module (no sequential head) that has learned so many of the target's texts."""
    module = make_module(
        head="none", block_size=BLOCK, mask_token_id=MASK, target_layer_ids=LAYERS, seed=1
    )
    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    traces = texts(count)
    for _ in range(steps):
        loss = torch.zeros(())
        for trace in traces:
            anchors = range(trace.prompt_length, len(trace.tokens) - BLOCK)
            wanted = torch.tensor([trace.tokens[at + 1 : at + 1 + BLOCK] for at in anchors])
            logits = block_logits(module, trace, list(anchors))
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval().requires_grad_(False)


class Clock:
    """A clock that only moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A target whose steps take 10 ms and 0.1 ms a row by a clock."""

    def __init__(self, inner: HFTarget, clock: Clock) -> None:
        self.inner = inner
        self.clock = clock
        self.info = inner.info
        self.exactness = inner.exactness

    def new_cache(self, *, memory_limit: int | None = None) -> Cache:
        return self.inner.new_cache(memory_limit=memory_limit)

    def forward(
        self, batch: TokenBatch, cache: Cache, *, capture: Sequence[int] = ()
    ) -> TargetOutput:
        self.clock.now += 0.010 + 0.0001 * batch.num_rows
        return self.inner.forward(batch, cache, capture=capture)


class Wrapped:
    """A drafter that takes so long by a clock, and may offer something else."""

    def __init__(self, inner: Drafter, clock: Clock, seconds: float = 0.001) -> None:
        self.inner = inner
        self.clock = clock
        self.seconds = seconds

    @property
    def name(self) -> str:
        return "wrapped"

    @property
    def capture(self) -> tuple[int, ...]:
        return self.inner.capture

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        self.clock.now += self.seconds
        return self.inner.propose(contexts)

    def release(self, request_id: int) -> None:
        self.inner.release(request_id)


class Silent(Wrapped):
    """A drafter that never proposes."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        return [Proposal.empty() for _ in contexts]


class Broken(Wrapped):
    """A drafter that fails."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        raise IndexError("index 7 is out of bounds")


def changed(module: DSparkModule, **settings: object) -> DSparkModule:
    """The same weights under another config, as a wrong config.json would load them."""
    other = copy.copy(module)
    other.config = dataclasses.replace(module.config, **settings)
    return other


def pair(module: DSparkModule | None = None, **options: object) -> tuple[Patient, Clock]:
    """A pair and the clock it runs by; the drafter costs 1 ms a call."""
    clock = Clock()
    module = fitted() if module is None else module
    drafter = Wrapped(DSparkDrafter(module, name="dflash"), clock)
    values = {"drafter": drafter, "trained": drafter, "module": module, "spec": "toy", **options}
    return Patient(target=Timed(target(), clock), **values), clock


def visit(patient: Patient, clock: Clock, **config: object) -> DoctorReport:
    """All checks, without a measured run: times are the clock's."""
    settings = DoctorConfig(max_tokens=MAX_TOKENS, has_run=False, **config)
    return diagnose(patient, asked(), settings, clock=clock)
