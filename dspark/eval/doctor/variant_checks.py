"""Checks that try the draft in other settings: layer ids, mask token, block.

A setting is blamed only if another one does clearly better at the same places of the same texts
(`dspark.eval.doctor.replay.Comparison.is_clear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from dspark.draft.base import Drafter
from dspark.draft.dspark_config import DSparkConfig
from dspark.errors import ConfigError
from dspark.eval.doctor.exam import Exam
from dspark.eval.doctor.findings import CheckResult, Finding, Severity
from dspark.eval.doctor.patient import Patient
from dspark.eval.doctor.replay import Comparison, Replay, compare, replay

__all__ = ["SHIFTS", "check_block", "check_layers", "check_mask", "shifted_layers"]

SHIFTS = (-1, 1)
"""How far layer ids are moved to see whether they are off by one."""

_BLOCKS = (4, 5, 7, 8, 10, 15, 16)  # that drafts are commonly trained with
_FEW = 6  # places a trace for a first look at a mask token
_NAMED = ("mask", "noise", "pad", "reserved", "unused", "fim")
_ENDS = 4  # ids tried at either end of the vocabulary, where special tokens tend to be


def shifted_layers(capture: Iterable[int], shift: int, num_layers: int) -> dict[int, int] | None:
    """Layer asked for -> layer to give instead; None if a moved one does not exist.

    Args:
        capture: Layers that the draft asks for, -1 for the embeddings.
        shift: How far to move them.
        num_layers: Of the target; what lies past the last layer is of another kind and not moved
            to.
    """
    moved = {layer: layer + shift for layer in capture}
    inside = all(-1 <= layer < num_layers for pair in moved.items() for layer in pair)
    return moved if inside else None


def check_layers(exam: Exam) -> CheckResult:
    """Whether the draft reads the layers it was trained on."""
    name, patient = "layer ids", exam.patient
    trained = patient.trained
    if trained is None or not trained.capture:
        return CheckResult.skipped(name, "the draft reads no hidden states")
    base = exam.strides
    figures: dict[str, object] = {"layers": list(trained.capture), "tokens": _tokens(base)}
    tried: dict[int, Comparison] = {}
    for shift in SHIFTS:
        serve = shifted_layers(trained.capture, shift, patient.target.info.num_layers)
        if serve is None:
            continue
        run = replay(trained, exam.traces, exam.config.strides, serve=serve, clock=exam.clock)
        tried[shift] = compare(base, run)
        figures[f"tokens_at_{shift:+d}"] = tried[shift].other
    if not tried:
        return CheckResult.skipped(name, "its layers have no neighbours to compare with")
    shift, best = max(tried.items(), key=lambda item: item[1].other)
    listed = ", ".join(f"{s:+d}: {both.other:.2f}" for s, both in tried.items())
    seen = f"{_tokens(base):.2f} tokens a round with layers {list(trained.capture)}; {listed}"
    if not best.is_clear:
        return CheckResult(name=name, seen=seen, figures=figures)
    better = [layer + shift for layer in trained.capture]
    found = Finding(
        severity=Severity.PROBLEM,
        what=f"the draft's layer ids are off by one: {list(trained.capture)} should be {better}",
        evidence=f"{best.other:.2f} tokens a round with the outputs of layers {better}, "
        f"{best.base:.2f} as configured",
        advice=_layer_advice(patient.config, shift),
    )
    return CheckResult(name=name, findings=(found,), seen=seen, figures=figures)


def _layer_advice(config: Mapping[str, object], shift: int) -> str:
    fields = ("target_layer_ids", "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
    named = [field for field in fields if field in config]
    field = named[0] if named else "the layer ids"
    how = "lower" if shift < 0 else "raise"
    return (
        f"{how} every entry of {field} in the draft's config.json by one (layouts differ: "
        "speculators and EAGLE-3 count the layer that a state enters, DeepSpec the one it leaves)"
    )


# -- mask token -------------------------------------------------------------------------------


def check_mask(exam: Exam) -> CheckResult:
    """Whether the mask token is the one that the draft was trained with."""
    name, block = "mask token", exam.patient.block
    if block is None:
        return CheckResult.skipped(name, "the draft has no mask token that could be changed")
    mask = block.mask_token_id
    found: list[Finding] = []
    figures: dict[str, object] = {"mask_token_id": mask, "tokens": _tokens(exam.strides)}
    better = _better_mask(exam, block)
    if better is not None:
        token, both = better
        figures |= {"better": token, "tokens_with_it": both.other}
        found.append(
            Finding(
                severity=Severity.PROBLEM,
                what=f"the mask token should probably be {token}, not {mask}",
                evidence=f"{both.other:.2f} tokens a round with {token}, {both.base:.2f} with "
                f"{mask}",
                advice=f"set mask_token_id to {token} in the draft's config.json",
            )
        )
    found += _ordinary(exam.patient, mask, exam)
    row = _embedding(exam.patient, mask)
    if row is not None:
        found.append(row)
    seen = f"{mask}, {_tokens(exam.strides):.2f} tokens a round"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


def _ordinary(patient: Patient, mask: int, exam: Exam) -> list[Finding]:
    """The mask token stands in texts, where the draft takes it for a place to fill."""
    count = sum(trace.tokens.count(mask) for trace in exam.traces)
    if not count or mask in patient.target.info.eos_token_ids:
        return []
    total = sum(len(trace.tokens) for trace in exam.traces)
    return [
        Finding(
            severity=Severity.WARNING,
            what=f"the mask token {mask} is a token of ordinary texts",
            evidence=f"it stands {count} times in {total} tokens of prompts and answers",
            advice="check mask_token_id in the draft's config.json against its model card",
        )
    ]


@torch.inference_mode()
def _embedding(patient: Patient, mask: int) -> Finding | None:
    """A mask token whose embedding is zero or not finite."""
    module = patient.module
    if module is None:
        return None
    vocab = module.config.vocab_size
    some = torch.linspace(0, vocab - 1, min(vocab, 256), device=module.device).long()
    usual = float(module.embed(some).float().norm(dim=1).median())
    own = float(module.embed(torch.tensor([mask], device=module.device)).float().norm())
    if own == own and own > 1e-3 * usual:  # NaN is not itself
        return None
    return Finding(
        severity=Severity.WARNING,
        what=f"the embedding of the mask token {mask} was never trained",
        evidence=f"its norm is {own:.3g}, the median norm of others {usual:.3g}",
        advice="check mask_token_id in the draft's config.json, or whether weights are missing",
    )


def _better_mask(exam: Exam, block: DSparkConfig) -> tuple[int, Comparison] | None:
    """A mask token that does clearly better, if one of the likely ones does."""
    few = replace(exam.config.strides, places=_FEW)
    start = exam.clock()
    base = replay(exam.patient.variant(), exam.traces, few, clock=exam.clock)
    each = max(exam.clock() - start, 1e-9)
    affordable = int(exam.config.variant_seconds / each)
    tried: list[tuple[float, int]] = []
    for token in _likely_masks(exam, block)[: min(exam.config.max_variants, affordable)]:
        drafter = exam.patient.variant(mask_token_id=token)
        run = replay(drafter, exam.traces, few, clock=exam.clock)
        tried.append((compare(base, run).other, token))
    if not tried or max(tried)[0] <= _tokens(base):
        return None
    token = max(tried)[1]
    both = _against(exam, exam.patient.variant(mask_token_id=token))
    return (token, both) if both.is_clear else None


def _likely_masks(exam: Exam, block: DSparkConfig) -> list[int]:
    """Tokens that could be meant: named ones, neighbours, both ends of the vocabulary."""
    vocab, mask = block.vocab_size, block.mask_token_id
    named: list[int] = []
    codec = exam.patient.codec
    if codec is not None:
        words = codec.vocabulary().items()
        named = [
            token for text, token in words if text[:1] in "<[" and any(n in text for n in _NAMED)
        ]
        first_free = 1 + max(codec.vocabulary().values())
        named = [*sorted(named)[:8], first_free]
    ends = [*range(_ENDS + 4), *range(vocab - _ENDS, vocab)]
    order = [mask - 1, mask + 1, *named, *ends]
    return [t for t in dict.fromkeys(order) if 0 <= t < vocab and t != mask]


# -- block ------------------------------------------------------------------------------------


def check_block(exam: Exam) -> CheckResult:
    """Whether the block is as long as in training, and begins where it did."""
    name, block = "block size", exam.patient.block
    if block is None:
        return CheckResult.skipped(name, "the draft has no block")
    figures: dict[str, object] = {"block_size": block.block_size, "gamma": block.gamma}
    found = _named_otherwise(exam.patient, block)
    blocks = _Blocks(exam, block)
    changes: list[dict[str, object]] = [{"sample_from_anchor": not block.sample_from_anchor}]
    changes += [{"block_size": size} for size in _other_blocks(exam, block)]
    clear: list[dict[str, object]] = []
    for change in changes:
        both = blocks.compare(change)
        if both is None:
            continue
        ((key, value),) = change.items()
        figures[f"tokens_with_{key}_{str(value).lower()}"] = both.other
        if both.is_clear:
            clear.append(change)
    if clear:
        found.insert(0, _better_block(blocks, block, clear))
    found += _asked_depth(exam, block)
    seen = f"{block.block_size} slots, {block.gamma} tokens"
    return CheckResult(name=name, findings=tuple(found), seen=seen, figures=figures)


class _Blocks:
    """Other blocks against the one that is configured, each pair to a depth that both reach."""

    def __init__(self, exam: Exam, block: DSparkConfig) -> None:
        self._exam = exam
        self._block = block
        self._bases: dict[int, Replay] = {}  # by depth

    def depth(self, change: Mapping[str, object]) -> int:
        """Tokens that both blocks draft."""
        changed = replace(self._block, **change)  # type: ignore[arg-type]
        return min(self._block.gamma, changed.gamma, self._exam.config.depth)

    def compare(self, change: Mapping[str, object], depth: int | None = None) -> Comparison | None:
        """Compare to a depth, or as deep as both reach; None for a block that cannot be."""
        try:
            drafter = self._exam.patient.variant(**change)
            depth = self.depth(change) if depth is None else depth
        except ConfigError:
            return None
        if depth not in self._bases:
            self._bases[depth] = self._run(self._exam.patient.variant(), depth)
        return compare(self._bases[depth], self._run(drafter, depth))

    def _run(self, drafter: Drafter, depth: int) -> Replay:
        config = replace(self._exam.config.strides, depth=depth, budget=depth)
        return replay(drafter, self._exam.traces, config, clock=self._exam.clock)


def _better_block(
    blocks: _Blocks, block: DSparkConfig, clear: Sequence[dict[str, object]]
) -> Finding:
    """The best of the blocks that do better, all compared to the depth that all reach."""
    depth = min(blocks.depth(change) for change in clear)
    tried = [(change, blocks.compare(change, depth)) for change in clear]
    sound = [(change, both) for change, both in tried if both is not None]
    change, both = max(sound, key=lambda item: item[1].other)
    ((key, value),) = change.items()
    label = f"{key} {str(value).lower()}"
    return Finding(
        severity=Severity.PROBLEM,
        what=f"the draft was trained with another block: {label} does better than "
        f"{str(getattr(block, key)).lower()}",
        evidence=f"{both.other:.2f} tokens a round against {both.base:.2f}, both to depth {depth}",
        advice=f"set {label} in the draft's config.json: a block of another length than trained "
        "spoils every position",
    )


def _other_blocks(exam: Exam, block: DSparkConfig) -> list[int]:
    own = block.block_size
    sizes = [own - 1, own + 1, *_BLOCKS]
    if exam.config.is_quick:
        sizes = [own - 1, own + 1]
    return [size for size in dict.fromkeys(sizes) if size >= 2 and size != own]


def _named_otherwise(patient: Patient, block: DSparkConfig) -> list[Finding]:
    """The draft's name says another block than its config."""
    import re

    said = re.search(r"block_?(\d+)", patient.name)
    if said is None or int(said[1]) in (block.block_size, block.gamma):
        return []
    return [
        Finding(
            severity=Severity.WARNING,
            what=f"the draft is named {patient.name}, but its block_size is {block.block_size}",
            evidence=f"the name says {said[1]} slots",
            advice=f"set block_size to {said[1]} in config.json if acceptance is low",
        )
    ]


def _asked_depth(exam: Exam, block: DSparkConfig) -> list[Finding]:
    asked = exam.config.depth
    if asked >= block.gamma:
        return []
    return [
        Finding(
            severity=Severity.NOTE,
            what=f"the depth {asked} leaves {block.gamma - asked} of the block's {block.gamma} "
            "positions unused",
            evidence=f"block_size {block.block_size}, --depth {asked}",
            advice=f"use --depth {block.gamma}; the block is computed whole in any case",
        )
    ]


# -- shared -----------------------------------------------------------------------------------


def _against(exam: Exam, drafter: Drafter) -> Comparison:
    """Another drafter against the draft as it is, at all places."""
    run = replay(drafter, exam.traces, exam.config.strides, clock=exam.clock)
    return compare(exam.strides, run)


def _tokens(run: Replay) -> float:
    """Mean tokens of a round at the places of a replay."""
    places = run.places
    return 1 + sum(place.accepted for place in places) / len(places) if places else 1.0
