"""Raw runs of a benchmark: what one configuration did with every prompt, once.

All figures are made from these records alone (bench_figures.py), so that they can be made again
from a result file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["STAGES", "Memory", "RequestRecord", "RunOutput", "RunRecord", "count_rounds"]

STAGES = ("prefill", "draft", "verify", "rest")
"""Where the seconds of a run of dspark's own go; `rest` is what the others leave of the run."""

_DIGITS = 6  # of seconds in JSON: microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One prompt's answer.

    Attributes:
        question_id: As in the prompt set.
        category: As in the prompt set.
        prompt_tokens: Tokens of its prompt.
        output_tokens: Tokens that came, also where it failed later.
        ttft: Seconds from sending it to its first token, None if none came.
        seconds: Seconds from sending it to its last token or its failure.
        gaps: After the first chunk of tokens, one (seconds since the chunk before, tokens) a chunk.
        rounds: Forwards after the prefill, None where the runner does not tell.
        committed: Tokens that these rounds added.
        digest: Checksum of the answer's token ids, None where the runner does not tell them.
        error: One sentence if it failed, else None.
    """

    question_id: str | int
    category: str
    prompt_tokens: int
    output_tokens: int
    ttft: float | None
    seconds: float
    gaps: tuple[tuple[float, int], ...] = ()
    rounds: int | None = None
    committed: int | None = None
    digest: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON, seconds to the microsecond."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        ttft = None if self.ttft is None else round(self.ttft, _DIGITS)
        gaps = [[round(seconds, _DIGITS), tokens] for seconds, tokens in self.gaps]
        return {**fields, "ttft": ttft, "seconds": round(self.seconds, _DIGITS), "gaps": gaps}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> RequestRecord:
        """What `to_json` made."""
        gaps = tuple((float(seconds), int(tokens)) for seconds, tokens in row["gaps"])
        return RequestRecord(**{**row, "gaps": gaps})


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of a run, in bytes; None where it is not known.

    Attributes:
        peak_rss: Most that the process held, all models loaded into it included.
        cache: Most that the target's K/V took.
        device: Most that was allocated on the device.
    """

    peak_rss: int | None = None
    cache: int | None = None
    device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutput:
    """What a runner gives back.

    Attributes:
        seconds: Wall-clock seconds of the run.
        requests: One record per prompt, in the order of the prompts.
        rounds: Forwards after prefills, None where the runner does not tell.
        proposed: Nodes drafted.
        verified: Nodes run through the target.
        accepted: Drafted tokens accepted.
        tau: Committed tokens per round.
        stages: Seconds by `STAGES`.
        cache_bytes: Most that the target's K/V took.
        counters: Speculation counters of a server over this run.
    """

    seconds: float
    requests: tuple[RequestRecord, ...]
    rounds: int | None = None
    proposed: int | None = None
    verified: int | None = None
    accepted: int | None = None
    tau: float | None = None
    stages: Mapping[str, float] | None = None
    cache_bytes: int | None = None
    counters: Mapping[str, float] | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers that did not fail."""
        return sum(item.output_tokens for item in self.requests if item.error is None)

    @property
    def is_lost(self) -> bool:
        """True if no request succeeded."""
        return all(item.error is not None for item in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of a configuration at one concurrency.

    Attributes:
        configuration: Its name.
        concurrency: Requests under way at a time.
        repeat: Which repeat, from 0.
        output: What the runner gave back.
        memory: Memory it took.
    """

    configuration: str
    concurrency: int
    repeat: int
    output: RunOutput
    memory: Memory = field(default_factory=Memory)

    @property
    def is_whole(self) -> bool:
        """True if no request failed."""
        return all(item.error is None for item in self.output.requests)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        output = self.output
        names = ("tau", "rounds", "proposed", "verified", "accepted")
        stages, counters = output.stages, output.counters
        return {
            "configuration": self.configuration,
            "concurrency": self.concurrency,
            "repeat": self.repeat,
            "seconds": round(output.seconds, _DIGITS),
            "output_tokens": output.output_tokens,
            **{name: getattr(output, name) for name in names},
            "stages": None if stages is None else {k: round(stages[k], _DIGITS) for k in STAGES},
            "memory": {name: getattr(self.memory, name) for name in Memory.__slots__},
            "counters": None if counters is None else dict(counters),
            "requests": [item.to_json() for item in output.requests],
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> RunRecord:
        """What `to_json` made."""
        names = ("seconds", "tau", "rounds", "proposed", "verified", "accepted", "stages")
        memory = Memory(**row["memory"])
        output = RunOutput(
            requests=tuple(RequestRecord.from_json(item) for item in row["requests"]),
            cache_bytes=memory.cache,
            counters=row["counters"],
            **{name: row[name] for name in names},
        )
        return RunRecord(
            configuration=row["configuration"],
            concurrency=row["concurrency"],
            repeat=row["repeat"],
            output=output,
            memory=memory,
        )


def count_rounds(output: RunOutput) -> RunOutput:
    """Fill in rounds and tau of a run from those of its requests that did not fail."""
    fine = [item for item in output.requests if item.error is None]
    rounds = _total([item.rounds for item in fine])
    committed = _total([item.committed for item in fine])
    tau = committed / rounds if rounds and committed is not None else None
    return replace(output, rounds=rounds, tau=tau)


def _total(counts: Sequence[int | None]) -> int | None:
    """Sum, None where one is not known or there are none."""
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
