"""Does `dspark simulate` predict what the engine does? Both run, side by side.

The target's steps are measured (or read from --profile), rounds are recorded with whole proposals
verified, and drafting, the rest of a round and prefill are timed on prompts of their own. From
these three the throughput at each concurrency is predicted; then the engine answers the prompts
with that concurrency. Nothing of the runs that are compared goes into the prediction. Where memory
is shared with other machines its speed changes from minute to minute, so steps are measured anew
before every run, and a run is compared with the prediction from those; prompts take as much longer
or shorter than when they were timed as the largest step does.

    python benchmarks/simulate_check.py --draft lookup --prompts 24 --max-tokens 64 --out check.json

Close other programs first. The last line is one JSON object; --within 0.1 exits with 3 if a
prediction is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from common import describe, finish

from dspark.engine import Engine, EngineConfig
from dspark.eval.bench_records import RunOutput
from dspark.eval.bench_setup import bench_requests
from dspark.eval.profile import Profile, read_profile, seconds_for
from dspark.eval.profile_measure import ProfileConfig, measure_profile
from dspark.eval.prompts import OWN, load_prompts
from dspark.eval.runner import Runner, eval_engine, explicit_params
from dspark.eval.runners.base import BenchRequest
from dspark.eval.runners.own import OwnRunner
from dspark.eval.simulate.costs import Costs, ProfileSteps
from dspark.eval.simulate.measured import fit_line
from dspark.eval.simulate.policy import parse_policy
from dspark.eval.simulate.pool import Pool
from dspark.eval.simulate.recorded import recorded_pool
from dspark.eval.simulate.run import Limits, Server, simulate
from dspark.eval.simulate.workload import Workload
from dspark.request import SamplingParams

_AGAIN = ProfileConfig(contexts=(128, 512), repeats=2)
"""What is measured before every run."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="lookup")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", help="a file of dspark profile (default: measure one)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts that are compared")
    parser.add_argument("--calibrate", type=int, default=16, help="prompts to time costs with")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=1, help="1 is a chain")
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--within", type=float)
    parser.add_argument("--out")
    return parser.parse_args()


def _policy(schedule: str, width: int | None) -> str:
    """The simulator's name for the engine's schedule; under the greedy rule auto is global."""
    return f"{'chain' if width == 1 else 'tree'}:{'global' if schedule == 'auto' else schedule}"


def _measured_costs(
    runner: OwnRunner, requests: Sequence[BenchRequest], levels: Sequence[int], profile: Profile
) -> Costs:
    """Drafting, the rest of a round, and prefill, timed on these prompts."""
    counts, parts = [], {"draft": [], "rest": []}
    prompts = prefill = 0.0
    for level in levels:
        runner.run(requests[:level], level, lambda share: None)
        output = runner.run(requests[: max(level, 4)], level, lambda share: None)
        stages, rounds = output.stages or {}, output.rounds or 1
        counts.append(float(level))
        for name, values in parts.items():
            values.append(level * stages[name] / rounds)
        prompts += sum(item.prompt_tokens for item in output.requests)
        prefill += stages["prefill"]
    draft, rest = (fit_line(counts, parts[name]) for name in ("draft", "rest"))
    return Costs(
        steps=ProfileSteps(profile),
        draft={"chain": draft, "tree": draft},
        rest=rest,
        prefill_rate=prompts / prefill,
        stated=(f"draft {draft}, rest {rest}, prefill {prompts / prefill:.0f} tokens/s",),
    )


def _steps_now(engine: Engine, given: str | None, profile: Profile) -> Profile:
    """Steps measured anew; those of the file if one was given."""
    if given is not None:
        return profile
    return measure_profile(engine.target, _AGAIN, codec=engine.codec)


def _prefill_rate(costs: Costs, then: Profile, now: Profile) -> float | None:
    """Prompt tokens a second at the speed that the machine has now."""
    if costs.prefill_rate is None:
        return None
    before, after = (seconds_for(profile, max(_AGAIN.rows), 128) for profile in (then, now))
    return costs.prefill_rate * before / after


def _predict(
    policy: str,
    pool: Pool | None,
    costs: Costs,
    requests: Sequence[BenchRequest],
    *,
    max_tokens: int,
    limits: Limits,
) -> float:
    """Tokens a second for these prompts, each with its own recorded rounds, to the last answer."""
    prompt = np.array([[len(item.token_ids) for item in requests]])
    workload = Workload(
        prompt=prompt,
        output=np.full(prompt.shape, max_tokens),
        start=np.arange(len(requests))[None],
        arrival=np.zeros(prompt.shape),
        drains=True,
    )
    server = Server(policy=parse_policy(policy, skips=False), costs=costs, limits=limits, pool=pool)
    outcome = simulate(server, workload)
    return float(outcome.tokens.sum() / outcome.seconds.sum())


def _speeds(runs: Sequence[RunOutput]) -> list[float]:
    return [run.output_tokens / run.seconds for run in runs]


def _row(policy: str, level: int, predicted: list[float], speeds: list[float]) -> dict[str, Any]:
    """Predictions and runs of the same turns, compared, and shown."""
    off = [p / m - 1 for p, m in zip(predicted, speeds, strict=True)]
    row = {
        "policy": policy,
        "concurrency": level,
        "measured": round(statistics.median(speeds), 2),
        "least": round(min(speeds), 2),
        "largest": round(max(speeds), 2),
        "predicted": round(statistics.median(predicted), 2),
        "off": round(statistics.median(off), 4),
        "off, by turn": [round(value, 4) for value in off],
    }
    print(
        f"{policy:16} {level:4}  measured {row['measured']:8.2f}  predicted "
        f"{row['predicted']:8.2f} tok/s  off {100 * row['off']:+.1f} %",
        file=sys.stderr,
    )
    return row


def main() -> None:
    """Measure, predict, run, compare."""
    options = _options()
    levels = [int(part) for part in options.concurrency.split(",")]
    engine = Engine.load(
        target=options.target, draft=options.draft, dtype=options.dtype, threads=options.threads
    )
    print("measuring steps", file=sys.stderr)
    profile = (
        measure_profile(engine.target, ProfileConfig(), codec=engine.codec)
        if options.profile is None
        else read_profile(options.profile)
    )
    config = EngineConfig(
        auto_off=False,
        limits=engine.config.limits,
        schedule=options.schedule,
        step_seconds=partial(seconds_for, profile),
    )
    engine = Engine(
        engine.target,
        drafter=engine.drafter,
        codec=engine.codec,
        config=config,
        sampling_defaults=engine.sampling_defaults,
    )
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True, width=options.width)
    prompts = load_prompts(OWN).select(options.prompts + options.calibrate, first_turn=True)
    is_raw = options.raw or engine.codec is None or not engine.codec.has_chat_template
    asked = bench_requests(engine, prompts, seed=0, is_raw=is_raw)
    requests, apart = asked[: options.prompts], asked[options.prompts :]

    print("recording rounds", file=sys.stderr)
    recorder = eval_engine(engine, batch=1)
    whole = explicit_params(params, recorder)
    records = Runner(recorder, whole, is_raw=is_raw).run(prompts.questions[: options.prompts])
    pool = recorded_pool(records, name="recorded")
    if len(pool.starts) != len(requests):
        raise SystemExit("a prompt failed or has no rounds; use a larger --max-tokens")

    runners = {
        "plain": OwnRunner(engine, replace(params, tree_budget=0), auto_off=False),
        _policy(options.schedule, options.width): OwnRunner(engine, params, auto_off=False),
    }
    print("timing what is no step", file=sys.stderr)
    timed_at = _steps_now(engine, options.profile, profile)
    costs = {
        name: _measured_costs(runner, apart, levels, profile) for name, runner in runners.items()
    }
    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, int], list[RunOutput]] = {}
    steps: dict[tuple[str, int], list[Profile]] = {}
    for turn in range(options.repeats):
        for level in levels:
            for name, runner in runners.items():
                print(f"turn {turn + 1}: {name}, concurrency {level}", file=sys.stderr)
                seen = _steps_now(engine, options.profile, profile)
                steps.setdefault((name, level), []).append(seen)
                run = runner.run(requests, level, lambda share: None)
                runs.setdefault((name, level), []).append(run)
    sizes = engine.config.limits
    for (name, level), done in runs.items():
        predicted = [
            _predict(
                name,
                None if name == "plain" else pool,
                replace(
                    costs[name],
                    steps=ProfileSteps(seen),
                    prefill_rate=_prefill_rate(costs[name], timed_at, seen),
                ),
                requests,
                max_tokens=options.max_tokens,
                limits=Limits(
                    max_batch=level, max_rows=sizes.max_rows, prefill_chunk=sizes.prefill_chunk
                ),
            )
            for seen in steps[name, level]
        ]
        rows.append(_row(name, level, predicted, _speeds(done)))
    stated = {name: list(own.stated) for name, own in costs.items()}
    finish({**describe(), "options": vars(options), "costs": stated, "rows": rows}, options.out)
    if options.within is not None and any(abs(row["off"]) > options.within for row in rows):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
