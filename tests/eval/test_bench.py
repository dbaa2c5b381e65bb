"""The order of runs, the log, what is left out, the time left: on runners that do as told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark.errors import ConfigError, DataError
from dspark.eval.bench import Bench, plan_runs
from dspark.eval.bench_log import BenchLog
from dspark.eval.bench_memory import MemoryWatch
from dspark.eval.bench_progress import TimeLeft
from dspark.eval.bench_records import RunRecord
from tests.eval.bench_doubles import REQUESTS, Diary, contestant


def order(concurrencies: tuple[int, ...], repeats: int, **more: object) -> list[str]:
    diary: list[str] = []
    three = [contestant(name, diary, **more) for name in "ABC"]
    planned, _ = plan_runs(three, concurrencies, repeats)
    return [f"{p.contestant.name}{p.concurrency}.{p.repeat}" for p in planned]


def test_runs_are_interleaved_and_none_is_always_first() -> None:
    assert order((1,), 3) == [
        "A1.0",
        "B1.0",
        "C1.0",
        "B1.1",
        "C1.1",
        "A1.1",
        "C1.2",
        "A1.2",
        "B1.2",
    ]
    swept = order((1, 4), 2)
    assert swept[:6] == ["A1.0", "B1.0", "C1.0", "B4.0", "C4.0", "A4.0"]
    assert swept[6:] == ["C1.1", "A1.1", "B1.1", "A4.1", "B4.1", "C4.1"]


def test_what_a_runner_refuses_is_left_out_and_said() -> None:
    diary: list[str] = []
    able, single = contestant("A", diary), contestant("B", diary, batches=False)
    bench = Bench([able, single], REQUESTS, concurrencies=(1, 2), repeats=1)
    assert [p.name for p in bench.planned] == [("A", 1, 0), ("B", 1, 0), ("A", 2, 0)]
    (skipped,) = bench.skipped
    assert (skipped.configuration, skipped.concurrency) == ("B", 2)
    bench.run(Diary())
    results = bench.results({}, baseline="A", seed=0)
    reason = "it takes one prompt at a time"
    assert results["skipped"] == [{"configuration": "B", "concurrency": 2, "reason": reason}]


def test_two_configurations_of_one_name_are_refused() -> None:
    diary: list[str] = []
    with pytest.raises(ConfigError, match="'A' was asked for twice"):
        Bench([contestant("A", diary), contestant("A", diary)], REQUESTS)


def test_everything_is_loaded_and_warmed_up_before_the_first_run() -> None:
    diary: list[str] = []
    both = [contestant("A", diary), contestant("B", diary)]
    Bench(both, REQUESTS, concurrencies=(1,), repeats=2, warm_ups=2).run(Diary())
    assert diary[:2] == ["A prepared", "B prepared"]
    assert diary[2:6] == ["A 1 x1", "A 1 x1", "B 1 x1", "B 1 x1"]
    assert diary[6:10] == ["A 1 x2", "B 1 x2", "B 1 x2", "A 1 x2"]
    assert diary[10:] == ["A closed", "B closed"]


def test_an_interrupted_run_goes_on_from_its_log(tmp_path: Path) -> None:
    """And gives the figures of one that was never interrupted, all else being equal."""
    path, diary = tmp_path / "runs.jsonl", []

    def bench(key: str = "key") -> tuple[Bench, BenchLog]:
        log = BenchLog(path, key)
        two = [contestant("A", diary), contestant("B", diary, seconds=0.5)]
        return Bench(two, REQUESTS, repeats=2, warm_ups=0, log=log), log

    first, log = bench()
    with pytest.raises(KeyboardInterrupt):
        first.run(Diary(stops_at=3))
    log.close()
    assert log.count == 2
    assert diary[-2:] == ["A closed", "B closed"]  # nothing stays loaded
    with path.open("a") as file:
        file.write('{"key": "key", "run": {"conf')  # what a dying process left
    diary.clear()
    second, log = bench()
    watcher = Diary()
    second.run(watcher)
    log.close()
    assert second.resumed == 2
    assert diary[2:4] == ["B 1 x2", "A 1 x2"]
    found = ["found ('A', 1, 0)", "found ('B', 1, 0)", "ran ('B', 1, 1)", "ran ('A', 1, 1)"]
    assert watcher.lines[2:] == found
    whole = Bench([contestant("A", []), contestant("B", [], seconds=0.5)], REQUESTS, repeats=2)
    whole.run(Diary())
    assert len(path.read_text().splitlines()) == 4
    for item in ("tokens_per_second", "speedup", "ttft"):
        figures = [
            [figure[item] for figure in made.results({}, baseline="A", seed=0)["figures"]]
            for made in (second, whole)
        ]
        assert figures[0] == figures[1]

    third, log = bench()
    diary.clear()
    third.run(Diary())
    assert diary == ["A closed", "B closed"]  # all is there: nothing is loaded or run
    _, log = bench("another key")
    assert log.count == 0
    log.close()


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    diary: list[str] = []
    for repeats, fresh in ((1, 1), (3, 2)):
        log = BenchLog(tmp_path / "runs.jsonl", "key")
        bench = Bench([contestant("A", diary)], REQUESTS, repeats=repeats, warm_ups=0, log=log)
        bench.run(Diary())
        log.close()
        assert bench.resumed == repeats - fresh
    assert diary.count("A 1 x2") == 3


def test_a_run_with_failures_is_kept_in_the_results_and_tried_again(tmp_path: Path) -> None:
    path, diary = tmp_path / "runs.jsonl", []
    log = BenchLog(path, "key")
    two = [contestant("A", diary), contestant("B", diary, fails=lambda number: number == 1)]
    bench = Bench(two, REQUESTS, repeats=1, warm_ups=0, log=log)
    bench.run(Diary())
    log.close()
    found = bench.results({}, baseline="A", seed=0)
    assert [len(item["failed"]) for item in found["figures"]] == [0, 2]
    assert found["runs"][1]["requests"][0]["error"] == "it broke."
    assert [json.loads(line)["run"]["configuration"] for line in path.read_text().splitlines()] == [
        "A"
    ]


def test_a_configuration_that_is_dead_is_dropped_and_the_others_go_on() -> None:
    """A server that hangs would otherwise cost its time-out for every prompt of every repeat."""
    diary: list[str] = []
    two = [contestant("A", diary), contestant("B", diary, fails=lambda number: number >= 2)]
    bench = Bench(two, REQUESTS, repeats=4, warm_ups=0)
    watcher = Diary()
    bench.run(watcher)
    assert diary.count("A 1 x2") == 4
    assert diary.count("B 1 x2") == 2
    assert sorted(line for line in watcher.lines if line.startswith("dropped")) == [
        "dropped ('B', 1, 2)",
        "dropped ('B', 1, 3)",
    ]
    found = bench.results({}, baseline="A", seed=0)
    reason = "no request of repeat 2 succeeded, so later ones are left out"
    assert found["skipped"] == [{"configuration": "B", "concurrency": 1, "reason": reason}]
    figures = found["figures"]
    assert [item["repeats"] for item in figures] == [4, 2]
    assert figures[1]["speedup"]["median"] == 1  # of the repeat in which it lived


def test_records_survive_json() -> None:
    bench = Bench([contestant("A", [])], REQUESTS, repeats=1)
    bench.run(Diary())
    row = json.loads(json.dumps(bench.runs[0].to_json()))
    assert RunRecord.from_json(row).to_json() == row


def test_a_log_that_is_none_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "other", "run": {}}\n{"key": "mine", "run": {}}\n')
    assert BenchLog(path, "third").count == 0
    with pytest.raises(DataError, match=r"runs\.jsonl, line 2: not a line"):
        BenchLog(path, "mine")
    assert BenchLog(path, "mine", is_fresh=True).count == 0
    with pytest.raises(DataError, match="cannot be used"):
        BenchLog(tmp_path, "mine")


def test_the_time_left_knows_that_configurations_differ() -> None:
    now = [0.0]
    slow, fast = contestant("slow", []), contestant("fast", [])
    planned, _ = plan_runs([slow, fast], (1,), 2)  # slow fast | fast slow
    left = TimeLeft(planned, clock=lambda: now[0])
    assert left.seconds() is None
    left.started(planned[0])
    now[0] = 5.0
    left.advanced(0.5)
    assert left.seconds() == pytest.approx(35)  # all four are taken to be like this one
    left.ended(planned[0], 10.0)
    left.started(planned[1])
    now[0] = 6.0
    left.advanced(0.5)  # 2 s a run of the fast one
    assert left.seconds() == pytest.approx(1 + 2 + 10)
    left.ended(planned[1], 2.0)
    assert left.seconds() == pytest.approx(12)
    left.ended(planned[2], None)  # left out
    assert left.seconds() == pytest.approx(10)
    left.ended(planned[3], 10.0)
    assert left.seconds() == 0


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux sets a peak back"
)
def test_the_peak_of_a_run_is_its_own() -> None:
    """Memory that was given back before a run does not count in it."""
    block = bytearray(200 << 20)
    for start in range(0, len(block), 4096):
        block[start] = 1
    with_block = MemoryWatch("cpu").read(cache=5, is_local=True)
    del block
    without = MemoryWatch("cpu").read(cache=None, is_local=True)
    assert with_block.cache == 5
    assert with_block.device is None
    assert with_block.peak_rss - without.peak_rss > 150 << 20
    assert MemoryWatch("cpu").read(cache=None, is_local=False).peak_rss is None
