"""Replays: what a drafter would have offered along a text whose continuation is known.

Greedy verification of a tree against a text that the target itself wrote needs no forward of the
target: a node is accepted if it says what comes next. So one trace serves any number of variants of
a draft (other layers' hidden states under the same names, another mask token, another block size),
at the cost of the draft alone.

Two ways to walk along a text: from round to round, as decoding does (tau is that of a real run),
or in fixed strides, which puts all variants at the same places and makes them comparable place by
place.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dspark.draft.base import DraftContext, Drafter
from dspark.eval.doctor.traces import Trace
from dspark.eval.records import QuestionRecord, TurnRecord
from dspark.request import RoundStats, Rule, SamplingParams
from dspark.tree import DraftTree
from dspark.verify.noise import NoiseKey

__all__ = ["Comparison", "Place", "Replay", "ReplayConfig", "compare", "replay"]

_ids = itertools.count(1 << 40)  # far from any engine's request ids
_CLEAR = 3.0  # standard errors
_LEAST_GAIN = 0.15  # of the tokens of a round
_CLUSTER = 2.0  # places of one text are alike: their standard error is taken this much larger


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """How to replay.

    Attributes:
        budget: Nodes to offer at the most.
        depth: Longest path.
        width: Children per node; None leaves it to the drafter, 1 is a chain.
        stride: Tokens between places; None goes from round to round.
        places: Places a trace at the most; None for all.
        is_single: One request at a time, so that times are those of a single user.
    """

    budget: int = 15
    depth: int = 8
    width: int | None = None
    stride: int | None = None
    places: int | None = None
    is_single: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What was offered at one place.

    Attributes:
        trace: Which trace.
        context: Tokens of context, the anchor included.
        nodes: Nodes offered.
        depth: Depth of the tree.
        accepted: Drafted tokens that the target would have accepted.
        committed: Tokens the round would have committed.
    """

    trace: int
    context: int
    nodes: int
    depth: int
    accepted: int
    committed: int


@dataclass(slots=True, kw_only=True)
class Replay:
    """What a drafter did along some traces.

    Attributes:
        places: In order.
        seconds: Seconds of the drafter's calls, the first one of each group of requests left out:
            that one takes in the whole prompt.
        error: What the drafter raised, None if nothing; the places before it stay.
        warnings: What it logged.
    """

    places: list[Place] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def tau(self) -> float:
        """Committed tokens per round; 1 without any round."""
        if not self.places:
            return 1.0
        return sum(place.committed for place in self.places) / len(self.places)

    @property
    def draft_seconds(self) -> float:
        """Seconds of a call on average; 0 without any."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else 0.0

    @property
    def drafted(self) -> float:
        """Share of rounds with a proposal."""
        return sum(p.nodes > 0 for p in self.places) / len(self.places) if self.places else 0.0

    def by_trace(self, count: int) -> list[float]:
        """Tau of each trace; 1 for one without rounds."""
        taus = []
        for index in range(count):
            own = [place.committed for place in self.places if place.trace == index]
            taus.append(sum(own) / len(own) if own else 1.0)
        return taus

    def records(self, traces: Sequence[Trace]) -> list[QuestionRecord]:
        """The rounds as `dspark eval` keeps them, for its figures."""
        records = []
        for index, trace in enumerate(traces):
            rounds = tuple(_stats(place) for place in self.places if place.trace == index)
            turn = TurnRecord(
                text="",
                prompt_tokens=trace.prompt_length,
                output_tokens=len(trace.answer),
                finish_reason="length",
                seconds=0.0,
                first_token_seconds=0.0,
                seed=None,
                rounds=rounds,
            )
            records.append(
                QuestionRecord(
                    question_id=trace.question_id, category=trace.category, turns=(turn,)
                )
            )
        return records


def _stats(place: Place) -> RoundStats:
    return RoundStats(
        proposed=place.nodes,
        verified=place.nodes,
        accepted=place.accepted,
        committed=place.committed,
        depth=place.depth,
        tried=min(place.accepted + 1, place.depth),
        path=place.accepted,
    )


class _Walk:
    """One trace under way."""

    def __init__(self, index: int, trace: Trace, config: ReplayConfig) -> None:
        self.index = index
        self.trace = trace
        self.request_id = next(_ids)
        self.at = trace.prompt_length  # the anchor's position: what prefill yields
        self.fed = 0  # positions whose hidden states were handed over
        self.places = 0
        self._config = config

    @property
    def is_over(self) -> bool:
        config, left = self._config, len(self.trace.tokens) - 1 - self.at
        if config.places is not None and self.places >= config.places:
            return True
        # In strides no place is cut short by the end of the text.
        return left < (1 if config.stride is None else config.depth + 1)

    def context(
        self, serve: Mapping[int, int], transform: Callable[[Tensor], Tensor] | None
    ) -> DraftContext:
        """What the drafter is told here."""
        config = self._config
        left = len(self.trace.tokens) - 1 - self.at
        features = {}
        for asked, served in serve.items():
            rows = self.trace.states[served][self.fed : self.at]
            features[asked] = rows if transform is None else transform(rows)
        self.fed = self.at
        depth = min(config.depth, max(1, left - 1))
        return DraftContext(
            request_id=self.request_id,
            tokens=self.trace.tokens[: self.at + 1],
            prompt_length=self.trace.prompt_length,
            params=SamplingParams(
                depth=config.depth, width=config.width, tree_budget=config.budget
            ),
            rule=Rule.GREEDY,
            noise=NoiseKey(0),
            round=self.places + 1,
            budget=config.budget,
            depth=depth,
            width=config.width,
            features=features or None,
        )

    def judge(self, tree: DraftTree) -> Place:
        """Verify a tree here and go on."""
        known = self.trace.tokens
        accepted = _accepted(tree, known[self.at + 1 :])
        committed = min(accepted + 1, len(known) - 1 - self.at)
        place = Place(
            trace=self.index,
            context=self.at + 1,
            nodes=tree.num_nodes,
            depth=tree.max_depth,
            accepted=min(accepted, committed),
            committed=committed,
        )
        self.at += committed if self._config.stride is None else self._config.stride
        self.places += 1
        return place


def _accepted(tree: DraftTree, following: Sequence[int]) -> int:
    """Drafted tokens that agree with what follows the anchor."""
    pairs = zip(tree.parent.tolist(), tree.token.tolist(), strict=True)
    node_of: dict[tuple[int, int], int] = {}
    for node, key in enumerate(pairs):
        node_of.setdefault(key, node)
    node = -1
    for count, token in enumerate(following):
        found = node_of.get((node, token))
        if found is None:
            return count
        node = found
    return len(following)


def replay(
    drafter: Drafter,
    traces: Sequence[Trace],
    config: ReplayConfig,
    *,
    serve: Mapping[int, int] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Replay:
    """Draft along traces and judge what is offered.

    Args:
        drafter: The drafter; it forgets the replay's requests afterwards.
        traces: With states of the layers that are served.
        config: How.
        serve: Layer that the drafter asks for -> layer that it is given; None gives what it asks
            for. A shift by one shows what the draft would do with other layer ids.
        transform: Applied to hidden states before they are given.
        clock: Seconds of now.

    Returns:
        What it did. An error of the drafter ends the replay and stands in it.
    """
    given = {layer: layer for layer in drafter.capture} if serve is None else dict(serve)
    done = Replay()
    walks = [_Walk(index, trace, config) for index, trace in enumerate(traces)]
    groups = [[walk] for walk in walks] if config.is_single else [walks]
    with _listening() as heard:
        try:
            for group in groups:
                is_first = True
                while live := [walk for walk in group if not walk.is_over]:
                    contexts = [walk.context(given, transform) for walk in live]
                    start = clock()
                    proposals = drafter.propose(contexts)
                    if not is_first:
                        done.seconds.append(clock() - start)
                    is_first = False
                    for walk, proposal in zip(live, proposals, strict=True):
                        done.places.append(walk.judge(proposal.tree))
        except Exception as exc:  # noqa: BLE001 - drafters are plug-ins: what breaks in one is a
            # finding, whatever it is.
            done.error = f"{type(exc).__name__}: {exc}"
        finally:
            for walk in walks:
                drafter.release(walk.request_id)
    done.warnings = tuple(dict.fromkeys(heard))
    return done


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what drafters log, instead of printing it."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger("dspark.draft"), Ear(logging.WARNING)
    was = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(ear)
        logger.propagate = was


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two replays in strides, place by place.

    Attributes:
        base: Tokens of a round, the first one's mean.
        other: The second one's.
        errors: The difference in standard errors; 0 where nothing differs.
    """

    base: float
    other: float
    errors: float

    @property
    def is_clear(self) -> bool:
        """The second is better by 15 % at least, and by three standard errors."""
        return self.errors > _CLEAR and self.other > (1 + _LEAST_GAIN) * self.base


def compare(base: Replay, other: Replay) -> Comparison:
    """Compare what two variants of a draft would have committed at the same places.

    Args:
        base: A replay in strides.
        other: Another one of the same traces and strides; if it broke off, what both have counts.
    """
    count = min(len(base.places), len(other.places))
    if not count:
        return Comparison(base=1.0, other=1.0, errors=0.0)
    first = np.array([1.0 + place.accepted for place in base.places[:count]])
    second = np.array([1.0 + place.accepted for place in other.places[:count]])
    gaps = second - first
    spread = _CLUSTER * float(gaps.std()) / math.sqrt(count)
    mean = float(gaps.mean())
    errors = mean / spread if spread > 0 else math.copysign(1e3, mean) if mean else 0.0
    return Comparison(base=float(first.mean()), other=float(second.mean()), errors=errors)
