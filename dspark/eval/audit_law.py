"""Statistical test: what the engine emits against the target's own law, at many contexts.

Whole requests run through the engine (drafter, noise, rounds, verification, commit) over a target
that remembers its logits (`remembered.py`), thousands of samples per context, half of the noise's
variety from the seed and half from the sample index. Every position is tested: the first token, and
each later one given the tokens before it, which sees faults that the first-token test cannot
(residual of the wrong position, closing token from the draft).

The target's law is computed here from its logits, by code of its own.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dspark.engine import Engine, EngineConfig
from dspark.eval.audit_draws import DrawRecorder
from dspark.eval.audit_report import ONLY_REJECTIONS, CheckResult, Status
from dspark.eval.chi_square import (
    LEAST_EXPECTED,
    LawTest,
    compare_counts,
    critical_value,
    detectable_shift,
    noncentral_tail,
    pool,
    smallest,
)
from dspark.eval.remembered import RememberedTarget
from dspark.request import Rule, SamplingParams
from dspark.target import Target

__all__ = ["LawAudit", "lenient_law", "plain_law"]

FloatArray = NDArray[np.float64]

_BATCH = 64  # samples of a batch
_AT_ONCE = 32  # of them in a round
_LEAST_SAMPLES = 4 * int(LEAST_EXPECTED)  # of a beginning, for the token after it to be tested
_MOST_BEGINNINGS = 200  # tested per context
_LARGEST_BIAS = 2.0
_OTHER_SEEDS = 1 << 60
_TIE_SEEDS = 1 << 61
_TIES_TRIED, _TIES_KEPT = 12_000, 32


def plain_law(logits: FloatArray, params: SamplingParams) -> FloatArray:
    """The law that temperature, top-k, min-p and top-p make of logits, computed plainly.

    A second implementation on purpose: a fault in `verify.sampling` would otherwise be on both
    sides of the test.

    Args:
        logits: float64 [V].
        params: Without penalties, bias and bad words; temperature > 0.

    Returns:
        float64 [V].
    """
    order = np.argsort(-logits, kind="stable")
    sorted_law = np.exp((logits[order] - logits[order[0]]) / params.temperature)
    if params.top_k:
        sorted_law[params.top_k :] = 0.0
    sorted_law[sorted_law < params.min_p * sorted_law[0] * (1 - 1e-6)] = 0.0
    if params.top_p < 1:
        mass_before = np.cumsum(sorted_law) - sorted_law
        sorted_law[mass_before >= params.top_p * sorted_law.sum()] = 0.0
    law = np.zeros(len(logits), dtype=np.float64)
    law[order] = sorted_law / sorted_law.sum()
    return law


def lenient_law(target: FloatArray, draft: FloatArray, excess: float) -> FloatArray:
    """What comes out if one drafted token is accepted with (1 + excess) times its due chance.

    Args:
        target: float64 [V].
        draft: float64 [V].
        excess: 0 is the rule.

    Returns:
        float64 [V].
    """
    accepted = np.minimum(draft, (1 + excess) * target)
    rest = np.maximum(target - draft, 0.0)
    total = rest.sum()
    law: FloatArray = accepted + (1 - accepted.sum()) * (rest / total if total > 0 else target)
    return law


@dataclass(slots=True)
class _Cell:
    """Samples of one context."""

    target: RememberedTarget
    engine: Engine
    tokens: tuple[int, ...]
    samples: int = 0
    counts: dict[tuple[int, ...], Counter[int]] = field(default_factory=dict)
    repeated: int = 0  # batches whose samples were all the same

    def begin(self) -> tuple[int, ...]:
        """The beginning that all samples share: the context's last token."""
        return (self.tokens[-1],)


@dataclass(slots=True)
class LawAudit:
    """The test under one rule and one setting.

    Attributes:
        target: The real target.
        recorder: The drafter, with the identity check around it.
        contexts: Token lists that samples start from.
        params: Sampling parameters with temperature > 0, the rule and the tree's shape.
        seed: Seed of the first batch.
    """

    target: Target
    recorder: DrawRecorder
    contexts: Sequence[Sequence[int]]
    params: SamplingParams
    seed: int = 0
    rounds: int = 0
    verified: int = 0
    accepted: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _cells: list[_Cell] = field(default_factory=list)

    @property
    def rule(self) -> Rule:
        """The rule under test."""
        return self.params.resolved_rule

    @property
    def samples(self) -> int:
        """Samples drawn so far."""
        return sum(cell.samples for cell in self._cells)

    def run(self, turn: int) -> None:
        """Draw one batch of samples at every context."""
        if not self._cells:
            self._cells = [self._open(context) for context in self.contexts]
        for place, cell in enumerate(self._cells):
            seed = ((self.seed & 0xFFFF) << 32) + turn * len(self._cells) + place
            self._batch(cell, seed, is_one_seed=turn % 2 == 0)
            self.recorder.check()

    def probe_ties(self) -> None:
        """Let the drafter draw where two candidates nearly tie; these samples are not counted."""
        for cell in self._cells:
            seeds = self.recorder.seeds_that_tie(
                cell.tokens, self.params, start=_TIE_SEEDS, tried=_TIES_TRIED, count=_TIES_KEPT
            )
            params = [replace(self.params, seed=seed, max_tokens=3) for seed in seeds]
            cell.engine.generate([cell.target.prompt] * len(seeds), params)
            self.recorder.check()

    def _open(self, context: Sequence[int]) -> _Cell:
        target = RememberedTarget(self.target, context, capture=self.recorder.capture)
        config = EngineConfig(max_batch=_AT_ONCE, auto_off=False)
        engine = Engine(target, drafter=self.recorder, config=config)
        return _Cell(target, engine, tuple(context))

    def _batch(self, cell: _Cell, seed: int, *, is_one_seed: bool) -> None:
        """Draw a batch: one seed and many samples, or a seed each."""
        params = self.params
        if is_one_seed:
            several = replace(params, seed=seed, n=_BATCH)
            results = cell.engine.generate([cell.target.prompt], several)
        else:
            each = [replace(params, seed=_OTHER_SEEDS + (seed << 8) + i) for i in range(_BATCH)]
            results = cell.engine.generate([cell.target.prompt] * _BATCH, each)
        texts = []
        for result in results:
            if result.error is not None:
                self.errors.append(result.error)
                continue
            cell.samples += 1
            self.rounds += result.stats.rounds
            self.verified += result.stats.verified
            self.accepted += result.stats.accepted
            texts.append(tuple(result.token_ids))
            for at in range(1, len(result.token_ids)):
                beginning = tuple(result.token_ids[:at])
                counter = cell.counts.setdefault(beginning, Counter())
                counter[result.token_ids[at]] += 1
        cell.repeated += len(texts) > 1 and len(set(texts)) == 1

    # -- judging ------------------------------------------------------------------------------

    def _tests(self, cell: _Cell) -> Iterator[tuple[tuple[int, ...], LawTest]]:
        """Tests of every beginning with enough samples, the shortest first."""
        ripe = [b for b, c in cell.counts.items() if sum(c.values()) >= _LEAST_SAMPLES]
        ripe.sort(key=lambda beginning: (len(beginning), -sum(cell.counts[beginning].values())))
        for beginning in ripe[:_MOST_BEGINNINGS]:
            logits = cell.target.logits(beginning).double().numpy()
            yield beginning, compare_counts(cell.counts[beginning], plain_law(logits, self.params))

    def tests(self) -> dict[str, LawTest]:
        """All tests by name: the first token and later ones, at each context and together."""
        named: dict[str, LawTest] = {}
        firsts, laters = [], []
        for place, cell in enumerate(self._cells):
            later = []
            for beginning, test in self._tests(cell):
                if beginning == cell.begin():
                    named[f"context {place}, first token"] = test
                    firsts.append(test)
                else:
                    later.append(test)
            if later:
                named[f"context {place}, later tokens"] = pool(later)
                laters.append(pool(later))
        if len(firsts) > 1:
            named["all contexts, first token"] = pool(firsts)
        if len(laters) > 1:
            named["all contexts, later tokens"] = pool(laters)
        return {name: t for name, t in named.items() if t.dof > 0 or t.impossible}

    def result(self, alpha: float) -> CheckResult:
        """Judge what was drawn.

        Args:
            alpha: Chance of a false alarm that this check may take.

        Returns:
            The result.
        """
        tests = self.tests()
        level = alpha / max(1, len(tests))
        worst = min(tests, key=lambda name: tests[name].p_value, default="")
        power, caught = self._power(level) if tests else ("", {})
        status, evidence, advice = self._verdict(tests, worst, level)
        if status is Status.PASSED and not power:
            status = Status.INCONCLUSIVE
            evidence = f"{self.samples} samples are too few where the target is nearly certain"
            advice = "give more time (--minutes or --level), or a higher --temperature"
        return CheckResult(
            name=f"law, {self.rule.value}",
            status=status,
            evidence=evidence,
            power=power if self.verified else "",
            advice=advice,
            seconds=self.seconds,
            details={
                "rule": self.rule.value,
                "temperature": self.params.temperature,
                "top_k": self.params.top_k,
                "top_p": self.params.top_p,
                "min_p": self.params.min_p,
                "contexts": len(self._cells),
                "samples": self.samples,
                "judged_nodes": self.verified,
                "accepted_nodes": self.accepted,
                "tau": 1 + self.accepted / self.rounds if self.rounds else 0.0,
                "level": level,
                "tests": {name: _as_json(test) for name, test in tests.items()},
                "worst": worst,
                "would_catch": caught,
                "repeated_batches": sum(cell.repeated for cell in self._cells),
                "errors": self.errors[:8],
            },
        )

    def _verdict(
        self, tests: dict[str, LawTest], worst: str, level: float
    ) -> tuple[Status, str, str]:
        setting = _setting(self.params)
        if worst and tests[worst].p_value < level:
            test = tests[worst]
            evidence = (
                f"{worst}: {test.samples} tokens are not the target's law, p = "
                f"{test.p_value:.1e} at level {level:.1e} ({setting})"
            )
            if test.impossible:
                evidence += f"; token {test.impossible[0]} has probability 0 and came out"
            if any(cell.repeated for cell in self._cells):
                evidence += "; whole batches of samples were the same text: noise is used twice"
            return Status.FOUND, evidence, "do not sample with this pair under this rule; report it"
        if self.errors:
            return Status.FOUND, f"decoding failed: {self.errors[0]}", "report it"
        if not self.verified:
            evidence = f"nothing was drafted in {self.rounds} rounds, so no draft was judged"
            return Status.INCONCLUSIVE, evidence, "audit with prompts the drafter can draft for"
        if not tests:
            evidence = f"{self.samples} samples at {len(self._cells)} contexts are too few"
            return Status.INCONCLUSIVE, evidence, "give more time: --minutes or --level"
        evidence = (
            f"{self.samples} samples at {len(self._cells)} contexts ({setting}), "
            f"{self.verified} drafted nodes judged; least of {len(tests)} p-values "
            f"{tests[worst].p_value:.2g}"
        )
        if not self.accepted:
            evidence += ONLY_REJECTIONS
        return Status.PASSED, evidence, ""

    def _power(self, level: float) -> tuple[str, dict[str, float | None]]:
        """What the pooled first-token test would have caught with 90 %."""
        firsts: list[tuple[LawTest, FloatArray, FloatArray | None]] = []
        for cell in self._cells:
            for beginning, test in self._tests(cell):
                if beginning == cell.begin() and test.dof > 0:
                    logits = cell.target.logits(beginning).double().numpy()
                    law = plain_law(logits, self.params)
                    firsts.append((test, law, self.recorder.law_at(cell.tokens, self.params)))
                break
        dof = sum(test.dof for test, _, _ in firsts)
        if not dof:
            return "", {}
        # Moving mass d from the likeliest token to the others in proportion: the bias of that size
        # in total variation that is hardest to see but for one among rare tokens.
        weight = sum(t.samples / (m * (1 - m)) for t, law, _ in firsts if (m := law.max()) < 1)
        moved = math.sqrt(detectable_shift(level, dof) / weight) if weight else None
        lenient = self._lenient(firsts, level, dof)
        caught = {"total_variation": moved, "lenient_acceptance": lenient}
        parts = []
        if moved is not None and moved < 1:
            parts.append(f"{100 * moved:.1f} % of the mass moved at every context")
        if lenient is not None:
            parts.append(f"acceptance too lenient by {100 * lenient:.0f} %")
        return (", or ".join(parts) + " (90 %)" if parts else ""), caught

    def _lenient(
        self,
        firsts: Sequence[tuple[LawTest, FloatArray, FloatArray | None]],
        level: float,
        dof: int,
    ) -> float | None:
        """Least excess of acceptance that the test would have caught; None if none up to 200 %."""
        value = critical_value(level, dof)

        def is_caught(excess: float) -> bool:
            shift = sum(
                test.shift(lenient_law(law, draft, excess))
                for test, law, draft in firsts
                if draft is not None
            )
            return noncentral_tail(value, dof, shift) >= 0.9

        if not self.rule.draws_from_laws or not is_caught(_LARGEST_BIAS):
            return None
        return smallest(is_caught, 0.0, _LARGEST_BIAS)


def _setting(params: SamplingParams) -> str:
    parts = [f"T={params.temperature:g}"]
    parts += [f"top-k {params.top_k}"] if params.top_k else []
    parts += [f"top-p {params.top_p:g}"] if params.top_p < 1 else []
    parts += [f"min-p {params.min_p:g}"] if params.min_p else []
    return ", ".join(parts)


def _as_json(test: LawTest) -> dict[str, float | int]:
    return {
        "samples": test.samples,
        "statistic": round(test.statistic, 3),
        "dof": test.dof,
        "p_value": test.p_value,
    }
