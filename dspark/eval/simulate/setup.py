"""From what a user asks for to the costs and proposals of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.base_model.config import V4Config
from dspark.base_model.plan import read_model
from dspark.base_model.plan_devices import build_gpu
from dspark.base_model.plan_parts import Precision
from dspark.errors import ConfigError
from dspark.eval.profile import Profile, read_profile
from dspark.eval.simulate.costs import Costs, CountSeconds, Line, ProfileSteps, parse_line
from dspark.eval.simulate.measured import read_bench_costs
from dspark.eval.simulate.parametric import PUBLISHED, chain_pool, conditional_rates, tree_pool
from dspark.eval.simulate.pool import Pool
from dspark.eval.simulate.recorded import find_records, recorded_pool
from dspark.eval.simulate.roofline import Device, DraftRoofline, Roofline, build_device

__all__ = [
    "AcceptanceAsked",
    "MachineAsked",
    "build_costs",
    "build_pools",
    "parse_rates",
]

_BLOCK = 5  # tokens of a released DSpark block


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineAsked:
    """What rounds are to cost.

    Attributes:
        profile: A profile's file; None computes steps of `model` on GPUs.
        model: A preset, config.json or folder of DeepSeek-V4.
        gpu: A GPU's name.
        gpu_bandwidth: GB/s of another one, or None.
        tflops: Its TFLOP/s in bfloat16, FP8 and FP4, or None each.
        gpus: How many.
        bandwidth_share: Share of the peak that is reached.
        flops_share: Share of the peak that is reached.
        step_ms: Milliseconds of a step besides.
        draft_ms: Drafting, as `parse_line` reads it; None for what the other figures give.
        rest_ms: What is neither forward nor draft, likewise.
        prefill_rate: Prompt tokens a second; None for rows of the forward.
        bench: A file of `dspark bench` to take these three from, or None.
        bench_configuration: Which of its configurations.
    """

    profile: str | None = None
    model: str = "v4-flash-dspark"
    gpu: str = "H200-141GB"
    gpu_bandwidth: float | None = None
    tflops: tuple[float | None, float | None, float | None] = (None, None, None)
    gpus: int = 8
    bandwidth_share: float = 0.7
    flops_share: float = 0.5
    step_ms: float = 0.0
    draft_ms: str | None = None
    rest_ms: str | None = None
    prefill_rate: float | None = None
    bench: str | None = None
    bench_configuration: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceAsked:
    """What is to be drafted and accepted.

    Attributes:
        trace: A log of `dspark eval`; None for the stated model.
        configuration: Which of its configurations.
        tree_trace: A log with trees, or None.
        tree_configuration: Which of its configurations.
        rates: Of the stated model: see `parse_rates`.
        auroc: Of its confidence; None for a draft that knows the rates alone.
        mtp_rate: Acceptance of MTP-1's token; None for that of the chain's first.
        tree_recovery: h of the model of trees; None for no trees.
        tree_budget: Nodes of its trees, and of recorded ones at the most.
        budget: Nodes of a chain at the most; None for all.
        seed: Of the model's draws.
    """

    trace: str | None = None
    configuration: str | None = None
    tree_trace: str | None = None
    tree_configuration: str | None = None
    rates: str = "v4-pro-thinking"
    auroc: float | None = 0.85
    mtp_rate: float | None = None
    tree_recovery: float | None = None
    tree_budget: int = 15
    budget: int | None = None
    seed: int = 0


def parse_rates(text: str) -> tuple[float, ...]:
    """Read conditional acceptance by position: a published name, or rates such as 0.84,0.8,0.75.

    Raises:
        ConfigError: If it is neither.
    """
    if text in PUBLISHED:
        return conditional_rates(PUBLISHED[text])
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate <= 1 for rate in rates):
        raise ConfigError(
            f"--acceptance is {text!r}, but must be {' or '.join(PUBLISHED)}, or conditional rates "
            "by position in (0, 1], such as 0.84,0.8,0.75."
        )
    return rates


# -- proposals --------------------------------------------------------------------------------


def build_pools(asked: AcceptanceAsked) -> tuple[dict[str, Pool], list[str]]:
    """The proposals of each source, and what stands behind them, line by line.

    Raises:
        DsparkError: If a log cannot be used, or a figure is out of range.
    """
    if asked.mtp_rate is not None and not 0 < asked.mtp_rate <= 1:
        raise ConfigError(f"--mtp-acceptance is {asked.mtp_rate}, but must be in (0, 1].")
    if asked.trace is None:
        pools, lines = _stated(asked)
    else:
        pools, lines = _recorded(asked, asked.trace)
    if asked.tree_trace is not None:
        records = find_records(asked.tree_trace, asked.tree_configuration)
        pools["tree"] = recorded_pool(records, name="recorded trees", budget=asked.tree_budget)
        lines.append(
            f"trees: {len(pools['tree'].starts)} recorded answers, whole answers resampled"
        )
    return pools, lines


def _recorded(asked: AcceptanceAsked, trace: str) -> tuple[dict[str, Pool], list[str]]:
    records = find_records(trace, asked.configuration)
    chain = recorded_pool(records, name="recorded chains", as_chain=True, budget=asked.budget)
    pools = {"chain": chain}
    lines = [f"chains: {len(chain.starts)} recorded answers, whole answers resampled"]
    if asked.mtp_rate is None:
        pools["mtp"] = recorded_pool(records, name="their first tokens", as_chain=True).cut(1)
        lines.append("MTP-1: the first token of the recorded chains")
    else:
        pools["mtp"] = _mtp(asked.mtp_rate, asked)
        lines.append(f"MTP-1: accepted at {asked.mtp_rate:.3f}, rounds independent")
    if any(item.nodes for record in records for turn in record.turns for item in turn.rounds):
        pools["tree"] = recorded_pool(records, name="recorded trees", budget=asked.tree_budget)
        lines.append("trees: of the same log")
    return pools, lines


def _stated(asked: AcceptanceAsked) -> tuple[dict[str, Pool], list[str]]:
    rates = parse_rates(asked.rates)[: asked.budget]
    told = " ".join(f"{rate:.3f}" for rate in rates)
    chain = chain_pool(rates, name=f"chain {asked.rates}", auroc=asked.auroc, seed=asked.seed)
    length = chain.mean_committed(len(rates))
    sure = "no confidence" if asked.auroc is None else f"confidence with AUROC {asked.auroc:g}"
    lines = [
        f"acceptance by position, given the one before: {told} ({asked.rates}; accepted length "
        f"{length:.2f} with {len(rates)})",
        f"{sure}, calibrated; positions and rounds independent, no easy or hard texts",
    ]
    mtp_rate = rates[0] if asked.mtp_rate is None else asked.mtp_rate
    why = ", that of the chain's first position" if asked.mtp_rate is None else ""
    lines.append(f"MTP-1's token is accepted at {mtp_rate:.3f}{why}")
    pools = {"chain": chain, "mtp": _mtp(mtp_rate, asked)}
    if asked.tree_recovery is not None:
        pools["tree"] = tree_pool(
            rates,
            name=f"tree {asked.rates}",
            recovery=asked.tree_recovery,
            budget=asked.tree_budget,
            auroc=asked.auroc,
            seed=asked.seed,
        )
        lines.append(
            f"trees of {asked.tree_budget} nodes: a further candidate is right at "
            f"{asked.tree_recovery:g} if all before it are wrong; drafted in a chain's time"
        )
    return pools, lines


def _mtp(rate: float, asked: AcceptanceAsked) -> Pool:
    return chain_pool((rate,), name="MTP-1", auroc=asked.auroc, seed=asked.seed + 1)


# -- costs ------------------------------------------------------------------------------------


def build_costs(asked: MachineAsked) -> Costs:
    """Costs of rounds, with what stands behind them.

    Raises:
        DsparkError: If a file cannot be used, or a figure is out of range.
    """
    lines: list[str] = []
    draft: dict[str, CountSeconds] = {}
    rest: CountSeconds = Line()
    rate = asked.prefill_rate
    if asked.profile is not None:
        steps: ProfileSteps | Roofline = _profiled(read_profile(asked.profile), lines)
    else:
        config, _ = read_model(asked.model)
        device = _device(asked)
        steps = Roofline(config, device)
        draft = _drafting(config, device)
        lines += _describe(asked, config, device)
    if asked.bench is not None:
        found = read_bench_costs(asked.bench, asked.bench_configuration)
        draft = dict.fromkeys(("chain", "mtp", "tree"), found.draft)
        rest = found.rest
        rate = found.prefill_rate if rate is None else rate
        lines.append(
            f"from a bench: drafting {_tell(found.draft)}, the rest of a round {_tell(found.rest)}"
        )
    if asked.draft_ms is not None:
        line = parse_line("--draft-ms", asked.draft_ms)
        draft = dict.fromkeys(("chain", "mtp", "tree"), line)
        lines.append(f"drafting takes {_tell(line)}")
    if asked.rest_ms is not None:
        rest = parse_line("--rest-ms", asked.rest_ms)
        lines.append(f"the rest of a round takes {_tell(rest)}")
    if not draft:
        lines.append("drafting takes no time")
    prompts = "rows of the forward" if rate is None else f"{rate:,.0f} tokens/s on top of it"
    lines.append(f"prompt tokens, where they are run here, are {prompts}")
    return Costs(steps=steps, draft=draft, rest=rest, prefill_rate=rate, stated=tuple(lines))


def _tell(line: Line) -> str:
    return f"{1000 * line.base:.3g} ms and {1000 * line.each:.3g} ms a request"


def _profiled(profile: Profile, lines: list[str]) -> ProfileSteps:
    rows, contexts = profile.rows, profile.contexts
    model = profile.header.get("target")
    name = model["id"] if isinstance(model, dict) and "id" in model else "an unnamed target"
    lines.append(
        f"steps: measured on {name}, {rows[0]} to {rows[-1]} rows, contexts "
        f"{contexts[0]} to {contexts[-1]}; beyond, along the slope of the upper half"
    )
    return ProfileSteps(profile)


def _device(asked: MachineAsked) -> Device:
    return build_device(
        build_gpu(asked.gpu, None, asked.gpu_bandwidth),
        count=asked.gpus,
        tflops=asked.tflops,
        bandwidth_share=asked.bandwidth_share,
        flops_share=asked.flops_share,
        fixed_seconds=asked.step_ms / 1000,
    )


def _drafting(config: V4Config, device: Device) -> dict[str, CountSeconds]:
    """MTP-1 of one block and one row a request; DSpark of three blocks and its block's rows."""
    slots = config.dspark_block_size or _BLOCK
    rank = config.dspark_markov_rank or 256
    stages = config.draft_stages if config.is_dspark else 3
    dspark = DraftRoofline(config, device, stages=stages, slots=slots, markov_rank=rank)
    mtp = DraftRoofline(config, device, stages=1, slots=1)
    return {"chain": dspark, "tree": dspark, "mtp": mtp}


def _describe(asked: MachineAsked, config: V4Config, device: Device) -> list[str]:
    peaks = ", ".join(f"{p.value} {device.flops[p] / 1e12:,.0f}" for p in Precision)
    slots = config.dspark_block_size or _BLOCK
    return [
        f"steps: roofline of {asked.model} on {device.count} x {device.gpu.name}, "
        f"{device.gpu.bandwidth / 1e9:,.0f} GB/s and TFLOP/s {peaks} each",
        f"{device.bandwidth_share:.0%} of the bandwidth and {device.flops_share:.0%} of the FLOP/s "
        f"are reached; {asked.step_ms:g} ms of a step besides; no traffic between GPUs",
        "rows wake experts uniformly and independently; K/V is read once a request",
        f"drafting: roofline of the draft blocks, DSpark {slots} rows a request, MTP-1 one row; "
        "their fixed time by number of layers",
    ]
