"""A runner that does what it is told, and a watcher that writes down what happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dspark.eval.bench import Contestant, Planned
from dspark.eval.bench_records import RunOutput, RunRecord, count_rounds
from dspark.eval.runners.base import BenchRequest, Progress, failure
from dspark.request import SamplingParams
from tests.eval.test_bench_figures import answer

REQUESTS = [
    BenchRequest(question_id=k, category="one", text="abc", token_ids=(1, 2, 3), seed=k)
    for k in (1, 2)
]


class Scripted:
    """Answers every prompt in `seconds`, fails if told to, and keeps a diary.

    Args:
        name: For the diary.
        diary: What was done, in order.
        seconds: Of every answer.
        batches: False refuses concurrency above 1.
        fails: Told the number of the run; whether all of it fails.
    """

    library = None
    notes: Sequence[str] = ()
    is_local = True

    def __init__(
        self,
        name: str,
        diary: list[str],
        *,
        seconds: float = 1.0,
        batches: bool = True,
        fails: Callable[[int], bool] = lambda number: False,
    ) -> None:
        self.name = name
        self.diary = diary
        self.seconds = seconds
        self.batches = batches
        self.fails = fails
        self.count = 0

    def refuses(self, concurrency: int) -> str | None:
        return None if self.batches or concurrency == 1 else "it takes one prompt at a time"

    def prepare(self) -> None:
        self.diary.append(f"{self.name} prepared")

    def close(self) -> None:
        self.diary.append(f"{self.name} closed")

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, on_progress: Progress
    ) -> RunOutput:
        self.diary.append(f"{self.name} {concurrency} x{len(requests)}")
        self.count += 1
        if self.fails(self.count):
            records = [failure(request, "it broke.") for request in requests]
        else:
            records = [answer(r.question_id, self.seconds) for r in requests]
        on_progress(1.0)
        seconds = self.seconds * len(requests) / concurrency
        return count_rounds(RunOutput(seconds=seconds, requests=tuple(records)))


def contestant(name: str, diary: list[str], **more: object) -> Contestant:
    return Contestant(
        name=name,
        kind="transformers",
        runner=Scripted(name, diary, **more),
        params=SamplingParams(max_tokens=10, ignore_eos=True),
    )


class Diary:
    """A watcher; `stops_at` interrupts when so many runs have begun."""

    def __init__(self, *, stops_at: int | None = None) -> None:
        self.lines: list[str] = []
        self.shares: list[float] = []
        self.begun = 0
        self.stops_at = stops_at

    def preparing(self, contestant: Contestant) -> None:
        self.lines.append(f"loading {contestant.name}")

    def warming_up(self, planned: Planned) -> None:
        self.lines.append(f"warm-up {planned.contestant.name} {planned.concurrency}")

    def started(self, planned: Planned) -> None:
        self.begun += 1
        if self.begun == self.stops_at:
            raise KeyboardInterrupt

    def advanced(self, share: float) -> None:
        self.shares.append(share)

    def finished(self, planned: Planned, record: RunRecord, *, is_fresh: bool) -> None:
        self.lines.append(f"{'ran' if is_fresh else 'found'} {planned.name}")

    def dropped(self, planned: Planned) -> None:
        self.lines.append(f"dropped {planned.name}")
