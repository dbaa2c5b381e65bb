"""Figures of hand-made runs, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dspark.eval.bench_figures import bench_figures
from dspark.eval.bench_records import Memory, RequestRecord, RunOutput, RunRecord, count_rounds
from dspark.eval.bench_stats import Resamples, Timings, percentiles

MIB = 1 << 20


def answer(
    question: int, seconds: float, tokens: int = 10, *, category: str = "one", **more: object
) -> RequestRecord:
    fields = {"ttft": seconds / 10, "digest": "same", "prompt_tokens": 5, **more}
    return RequestRecord(
        question_id=question,
        category=category,
        output_tokens=tokens,
        seconds=seconds,
        **fields,
    )


def run_of(
    name: str, repeat: int, answers: list[RequestRecord], *, concurrency: int = 1, **more: object
) -> RunRecord:
    seconds = sum(item.seconds for item in answers) / concurrency
    output = RunOutput(seconds=seconds, requests=tuple(answers), **more)
    return RunRecord(
        configuration=name, concurrency=concurrency, repeat=repeat, output=count_rounds(output)
    )


def figures(*runs: RunRecord, **more: object) -> dict[str, dict]:
    found = bench_figures(runs, baseline="none", seed=0, **more)
    return {item["configuration"]: item for item in found}


def test_tokens_per_second_are_those_of_whole_runs() -> None:
    """Repeats of 20 tokens in 4, 5 and 2 seconds; users see 10 tokens in their own seconds."""
    runs = [
        run_of("none", 0, [answer(1, 1.0), answer(2, 3.0)]),
        run_of("none", 1, [answer(1, 2.0), answer(2, 3.0)]),
        run_of("none", 2, [answer(1, 1.0), answer(2, 1.0)]),
    ]
    found = figures(*runs)["none"]
    speed = found["tokens_per_second"]
    assert found["repeats"] == 3
    assert (speed["median"], speed["min"], speed["max"]) == pytest.approx((5, 4, 10))
    assert 10 / 3 <= speed["low"] <= 5 <= speed["high"] <= 10
    user = found["tokens_per_second_per_user"]
    # medians over prompts: (10 + 10/3) / 2, (5 + 10/3) / 2, 10
    assert (user["median"], user["min"], user["max"]) == pytest.approx((20 / 3, 25 / 6, 10))
    assert found["speedup"] is None  # it is the baseline


def test_the_share_of_a_runs_time_follows_how_long_answers_were_under_way() -> None:
    """Two at a time: 30 tokens in 4 seconds; of the second category, 10 in 3/4 of them."""
    runs = [run_of("none", 0, [answer(1, 2.0, 20), answer(2, 6.0, category="two")], concurrency=2)]
    found = figures(*runs)["none"]
    assert found["concurrency"] == 2
    assert found["tokens_per_second"]["median"] == pytest.approx(30 / 4)
    assert found["by_category"]["two"]["tokens_per_second"] == pytest.approx(10 / 3)
    assert found["by_category"]["one"]["tokens_per_second"] == pytest.approx(20)


def test_speed_ups_are_taken_repeat_by_repeat() -> None:
    """Ratios 2, 3 and 4 in repeats whose own speeds differ much more than that."""
    runs = []
    for repeat, (slow, ratio) in enumerate([(8.0, 2.0), (2.0, 3.0), (20.0, 4.0)]):
        runs.append(run_of("none", repeat, [answer(k, slow) for k in range(4)]))
        runs.append(run_of("lookup", repeat, [answer(k, slow / ratio) for k in range(4)]))
    speedup = figures(*runs)["lookup"]["speedup"]
    assert speedup["over"] == "none"
    assert (speedup["median"], speedup["min"], speedup["max"]) == pytest.approx((3, 2, 4))
    assert (speedup["low"], speedup["high"]) == pytest.approx((2, 4))


def test_an_interval_contains_the_ratio_and_narrows_with_prompts() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for prompts in (6, 96):
        runs = []
        for repeat in range(3):
            slow = rng.uniform(1, 4, size=prompts)
            fast = slow / rng.normal(1.5, 0.2, size=prompts)
            runs.append(run_of("none", repeat, [answer(k, s) for k, s in enumerate(slow)]))
            runs.append(run_of("lookup", repeat, [answer(k, s) for k, s in enumerate(fast)]))
        speedup = figures(*runs)["lookup"]["speedup"]
        assert speedup["low"] < 1.5 < speedup["high"]
        assert speedup["low"] <= speedup["median"] <= speedup["high"]
        widths.append(speedup["high"] - speedup["low"])
    assert widths[1] < widths[0] / 2


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    """Prompts differ 30-fold, the ratio is the same for all: its interval has no width."""
    slow = [1.0, 3.0, 30.0, 10.0]
    runs = [run_of("none", 0, [answer(k, s) for k, s in enumerate(slow)])]
    runs.append(run_of("lookup", 0, [answer(k, s / 2) for k, s in enumerate(slow)]))
    found = figures(*runs)
    speedup, speed = found["lookup"]["speedup"], found["lookup"]["tokens_per_second"]
    assert (speedup["low"], speedup["high"]) == pytest.approx((2, 2))
    assert speed["high"] > 2 * speed["low"]


def test_one_answer_has_no_interval() -> None:
    runs = [run_of("none", 0, [answer(1, 1.0)]), run_of("lookup", 0, [answer(1, 0.5)])]
    found = figures(*runs)["lookup"]
    assert found["speedup"]["median"] == pytest.approx(2)
    assert found["speedup"]["low"] is None
    assert found["tokens_per_second"]["high"] is None


def test_latencies_count_tokens_and_chunks() -> None:
    """Chunks of 4 tokens after 0.4 s and of 1 after 0.3 s: five tokens, two gaps."""
    first = answer(1, 1.0, 6, gaps=((0.4, 4), (0.3, 1)), ttft=0.2)
    second = answer(2, 1.0, 1, ttft=0.4)
    found = figures(run_of("none", 0, [first, second]))["none"]
    assert found["ttft"]["p50"] == pytest.approx(0.3)
    assert found["inter_token"]["p50"] == pytest.approx(0.1)
    assert found["inter_token"]["max"] == pytest.approx(0.3)
    assert found["inter_token"]["p95"] == pytest.approx(0.1 + 0.8 * 0.2)  # 3.8 of 0 .. 4
    assert found["inter_chunk"]["p50"] == pytest.approx(0.35)
    assert found["inter_chunk"]["max"] == pytest.approx(0.4)


def test_rounds_time_and_memory_are_summed_over_repeats() -> None:
    stages = {"prefill": 0.5, "draft": 0.0, "verify": 1.0, "rest": 0.5}
    other = {"prefill": 0.5, "draft": 1.0, "verify": 0.5, "rest": 0.0}
    first = run_of("none", 0, [answer(1, 2.0, rounds=4, committed=8)], stages=stages)
    second = run_of("none", 1, [answer(1, 2.0, rounds=1, committed=7)], stages=other)
    second = replace(second, memory=Memory(peak_rss=5 * MIB, cache=None))
    first = replace(first, memory=Memory(peak_rss=7 * MIB, cache=MIB))
    found = figures(first, second)["none"]
    assert found["tau"] == pytest.approx(15 / 5)
    assert found["by_category"]["one"]["tau"] == pytest.approx(3)
    share = {"prefill": 0.25, "draft": 0.25, "verify": 0.375, "rest": 0.125}
    assert found["stage_share"] == pytest.approx(share)
    assert found["memory"] == {"peak_rss": 7 * MIB, "cache": MIB, "device": None}


def test_failed_answers_take_no_part_but_are_listed() -> None:
    """A time-out of 60 s must not look like a slow answer, nor its time like a slow run."""
    lost = answer(2, 60.0, 3, error="no answer for 60 seconds.")
    runs = [
        run_of("none", 0, [answer(1, 1.0), answer(2, 1.0)]),
        run_of("server", 0, [answer(1, 0.5), lost]),
    ]
    found = figures(*runs)["server"]
    assert found["tokens_per_second"]["median"] == pytest.approx(20)
    assert found["tokens_per_second_per_user"]["median"] == pytest.approx(20)
    assert found["speedup"]["median"] == pytest.approx(2)  # of the first prompt alone
    (failure,) = found["failed"]
    assert failure == {"question_id": 2, "repeat": 0, "error": "no answer for 60 seconds."}


def test_a_configuration_whose_every_answer_failed_has_no_figures() -> None:
    lost = [answer(k, 1.0, 0, ttft=None, error="gone.") for k in (1, 2)]
    runs = [run_of("none", 0, [answer(1, 1.0), answer(2, 1.0)]), run_of("server", 0, lost)]
    found = figures(*runs)["server"]
    assert found["tokens_per_second"]["median"] is None
    assert found["speedup"] is None
    assert found["ttft"]["p50"] is None
    assert len(found["failed"]) == 2


def test_texts_are_compared_with_the_baselines() -> None:
    runs = [
        run_of("none", 0, [answer(1, 1.0), answer(2, 1.0)]),
        run_of("lookup", 0, [answer(1, 1.0), answer(2, 1.0, digest="other")]),
        run_of("server", 0, [answer(1, 1.0, digest=None), answer(2, 1.0, digest=None)]),
    ]
    found = figures(*runs, texts_of=frozenset({"none", "lookup"}))
    assert found["lookup"]["same_text"] == {"equal": 1, "of": 2}
    assert found["server"]["same_text"] is None


def test_answers_that_are_too_short_are_counted() -> None:
    runs = [run_of("none", 0, [answer(1, 1.0, 10), answer(2, 1.0, 7)])]
    assert figures(*runs)["none"]["ended_early"] is None
    assert figures(*runs, expected_tokens=10)["none"]["ended_early"] == 1


def test_resamples_are_seeded_and_agree_with_a_plain_loop() -> None:
    """The vectorised bootstrap against one that draws its resamples one by one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 50, size=(3, 7)).astype(float)
    seconds = rng.uniform(0.5, 2, size=(3, 7))
    timings = Timings(tokens, seconds, seconds)
    low, high = Resamples(3, 7, seed=4).speed(timings)
    assert Resamples(3, 7, seed=4).speed(timings) == (low, high)
    draws = np.random.default_rng(4)
    repeats = draws.integers(3, size=(2000, 3))
    prompts = draws.integers(7, size=(2000, 7))
    medians = [
        np.median([tokens[r, p].sum() / seconds[r, p].sum() for r in rows])
        for rows, p in zip(repeats, prompts, strict=True)
    ]
    assert (low, high) == pytest.approx(tuple(np.percentile(medians, (2.5, 97.5))))


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([], (50, 95), has_max=True) == {"p50": None, "p95": None, "max": None}
    assert percentiles([1.0, 2.0, 3.0], (50,)) == {"p50": 2.0}
