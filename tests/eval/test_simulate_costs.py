"""Step times: profiles as the engine reads them, rooflines against hand computations."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.base_model.plan import PlanRequest, plan_model
from dspark.base_model.plan_devices import build_gpu, distinct_experts
from dspark.base_model.plan_parts import Kind, WeightFormat
from dspark.base_model.presets import preset
from dspark.errors import ConfigError, DataError
from dspark.eval.profile import seconds_for
from dspark.eval.simulate.costs import Costs, Line, ProfileSteps, parse_line
from dspark.eval.simulate.measured import fit_line, read_bench_costs
from dspark.eval.simulate.roofline import DraftRoofline, Roofline, build_device
from dspark.payoff import RoundCosts
from tests.eval.test_profile import JAGGED, curve

CONFIG = preset("v4-tiny")


def _device(**more: float):
    return build_device(build_gpu("H200-141GB"), count=2, **more)


def _one(steps: Roofline, rows: int, context: float = 64, requests: int | None = None) -> float:
    count = rows if requests is None else requests
    return float(steps.seconds(np.array([rows]), np.array([count]), np.array([context]))[0])


# -- profiles ---------------------------------------------------------------------------------


def test_a_profile_is_read_as_the_engine_reads_it() -> None:
    profile = curve(JAGGED)
    own, engine = ProfileSteps(profile), RoundCosts(partial(seconds_for, profile))
    for context in (5.0, 100.0, 130.0, 900.0, 5000.0):
        for first, count in ((1, 5), (3, 40), (60, 200)):
            rows = np.arange(first, first + count)
            found = own.seconds(rows[None], np.array([[1]]), np.array([[context]]))[0]
            assert found.tolist() == engine.forwards(first, count, int(context)).tolist()


def test_contexts_of_replicas_are_told_apart() -> None:
    profile = curve(JAGGED)
    rows, context = np.array([2, 2, 4]), np.array([16.0, 4096.0, 16.0])
    found = ProfileSteps(profile).seconds(rows, rows, context)
    engine = RoundCosts(partial(seconds_for, profile))
    expected = [engine.forwards(int(r), 1, int(c))[0] for r, c in zip(rows, context, strict=True)]
    assert found.tolist() == expected


def test_prompts_take_rows_or_their_own_rate() -> None:
    profile = curve(JAGGED)
    args = (np.array([4]), np.array([8]), np.array([4]), np.array([16.0]))
    steps = ProfileSteps(profile)
    assert Costs(steps=steps).forward(*args)[0] == seconds_for(profile, 12, 16)
    rated = Costs(steps=steps, prefill_rate=100.0).forward(*args)[0]
    assert rated == pytest.approx(seconds_for(profile, 4, 16) + 0.08)
    with pytest.raises(ConfigError, match="prefill rate is 0"):
        Costs(steps=steps, prefill_rate=0.0)


def test_milliseconds_are_read() -> None:
    assert parse_line("--draft-ms", "3") == Line(0.003, 0.0)
    assert parse_line("--draft-ms", "3+0.5").seconds(np.array([0, 1, 4])).tolist() == [
        0.0,
        pytest.approx(0.0035),
        pytest.approx(0.005),
    ]
    for text in ("", "x", "1+y", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match="--draft-ms is"):
            parse_line("--draft-ms", text)


# -- rooflines --------------------------------------------------------------------------------


def test_a_step_that_only_reads_takes_the_bytes_of_the_plan() -> None:
    """With endless FLOP/s, a step of N rows is the plan's traffic over the bandwidth."""
    device = _device(bandwidth_share=0.5, flops_share=1.0)
    device = replace(device, flops=dict.fromkeys(device.flops, 1e30))
    steps = Roofline(CONFIG, device)
    for rows in (1, 7, 100):
        plan = plan_model(CONFIG, PlanRequest(context=64, batch=rows))
        expected = plan.traffic.total / device.bandwidth
        assert _one(steps, rows) == pytest.approx(expected, rel=1e-6)


def test_a_step_that_only_computes_takes_the_flops_of_the_plan() -> None:
    device = _device()
    gpu = replace(device.gpu, bandwidth=1e30)
    steps = Roofline(CONFIG, replace(device, gpu=gpu))
    plan = plan_model(CONFIG, PlanRequest(context=64))
    each = sum(term.flops / device.rate(term.precision) for term in plan.flops)
    assert _one(steps, 10) == pytest.approx(10 * each, rel=1e-6)


def test_rows_of_one_request_read_its_cache_once() -> None:
    device = _device()
    device = replace(device, flops=dict.fromkeys(device.flops, 1e30))
    steps = Roofline(CONFIG, device)
    plan = plan_model(CONFIG, PlanRequest(context=64))
    gap = _one(steps, 8) - _one(steps, 8, requests=2)
    assert gap == pytest.approx(6 * plan.cache_read.total / device.bandwidth, rel=1e-6)


def test_rows_wake_experts_as_the_plan_expects() -> None:
    device = _device()
    device = replace(device, flops=dict.fromkeys(device.flops, 1e30))
    steps = Roofline(CONFIG, device)
    routed = plan_model(CONFIG, PlanRequest(context=64)).weights[WeightFormat.RELEASE][Kind.ROUTED]
    experts, chosen = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
    woken = [distinct_experts(experts, chosen, rows) / experts for rows in (1, 3)]
    gap = _one(steps, 3, requests=1) - _one(steps, 1)
    assert gap == pytest.approx((woken[1] - woken[0]) * routed / device.bandwidth, rel=1e-6)


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 4000))
def test_more_rows_and_longer_contexts_take_no_less(rows: int, more: int, context: int) -> None:
    steps = Roofline(CONFIG, _device(fixed_seconds=1e-3))
    assert _one(steps, rows + more, context) >= _one(steps, rows, context) >= 1e-3
    assert _one(steps, rows, 2 * context) >= _one(steps, rows, context)


def test_drafting_takes_its_share_of_the_fixed_time() -> None:
    device = _device(fixed_seconds=0.1)
    small = DraftRoofline(CONFIG, device, stages=1, slots=1)
    large = DraftRoofline(CONFIG, device, stages=3, slots=5, markov_rank=16)
    none, one, many = small.seconds(np.array([0, 1, 64])).tolist()
    assert none == 0
    assert 0.1 / CONFIG.num_hidden_layers < one < many
    assert large.seconds(np.array([1]))[0] > 3 * 0.1 / CONFIG.num_hidden_layers


def test_gpus_need_their_figures() -> None:
    own = build_gpu(None, 80.0, 1000.0)
    with pytest.raises(ConfigError, match="not in the table"):
        build_device(own, count=1)
    assert build_device(own, count=1, tflops=(10.0, 20.0, None)).count == 1
    with pytest.raises(ConfigError, match="--gpus is 0"):
        build_device(own, count=0, tflops=(10.0, 20.0, None))
    with pytest.raises(ConfigError, match="--flops-share is 2"):
        _device(flops_share=2.0)
    with pytest.raises(ConfigError, match="--fp8-tflops is 0"):
        build_device(own, count=1, tflops=(10.0, 0.0, None))


# -- benches ----------------------------------------------------------------------------------


def test_a_line_is_fitted_with_no_part_below_zero() -> None:
    line = fit_line([1, 4, 16], [0.012, 0.018, 0.042])
    assert (line.base, line.each) == (pytest.approx(0.01), pytest.approx(0.002))
    assert fit_line([2, 2], [0.4, 0.4]) == Line(0.0, pytest.approx(0.2))
    assert fit_line([1, 2], [0.1, 0.3]).base == 0
    assert fit_line([1, 2], [0.3, 0.1]) == Line(pytest.approx(0.2), 0.0)


def _bench(path: Path, names: tuple[str, ...]) -> Path:
    runs = [
        {
            "configuration": name,
            "concurrency": level,
            "rounds": 100,
            "stages": {
                "prefill": 2.0,
                "draft": 100 / level * (0.01 + 0.002 * level),
                "verify": 9.0,
                "rest": 100 / level * 0.001 * level,
            },
            "requests": [{"prompt_tokens": 50}, {"prompt_tokens": 30}],
        }
        for name in names
        for level in (1, 8)
    ]
    data = {"schema": "dspark.bench", "version": 1, "baseline": "none", "runs": runs}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_costs_are_taken_from_a_bench(tmp_path: Path) -> None:
    found = read_bench_costs(_bench(tmp_path / "b.json", ("none", "lookup")), None)
    assert (found.draft.base, found.draft.each) == (pytest.approx(0.01), pytest.approx(0.002))
    assert (found.rest.base, found.rest.each) == (pytest.approx(0, abs=1e-12), pytest.approx(0.001))
    assert found.prefill_rate == pytest.approx(40.0)
    path = _bench(tmp_path / "c.json", ("none", "a", "b"))
    with pytest.raises(DataError, match="holds 2 configurations"):
        read_bench_costs(path, None)
    assert read_bench_costs(path, "b").prefill_rate == pytest.approx(40.0)
