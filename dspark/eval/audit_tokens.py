"""Token by token: speculative decoding against plain decoding of the same target and seeds.

Greedy, coupled and sample-match decoding promise the very tokens of plain decoding. Where the two
part, the values that decided (logits, with the noise of that position where noise decides) are
computed once more by a fresh plain prefill. In exact mode every difference is real. Without it, a
gap no larger than the target's measured noise is a numeric tie, which is counted and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dspark.draft.base import Drafter
from dspark.engine import Engine, EngineConfig
from dspark.eval.audit_cache import TargetNoise, fresh_logits
from dspark.eval.audit_report import ONLY_REJECTIONS, CheckResult, Status
from dspark.request import GenerationResult, Rule, SamplingParams
from dspark.target import Target
from dspark.verify.noise import NoiseKey, Stream, perturbed_topk
from dspark.verify.sampling import History, shape_logits

__all__ = ["Difference", "TokenAudit", "first_difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where two decodings of one prompt part.

    Attributes:
        prompt: Index of the prompt.
        position: Output position of the first difference.
        plain: Plain decoding's token there, None if its text had ended.
        drafted: Speculative decoding's token there, None if its text had ended.
        gap: Value of the plain token less that of the other, fresh; None if there is no pair.
        is_tie: True if rounding explains it.
        temperature: Temperature.
        seed: Seed.
    """

    prompt: int
    position: int
    plain: int | None
    drafted: int | None
    gap: float | None
    is_tie: bool
    temperature: float
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The difference as a JSON object."""
        return {
            name: getattr(self, name)
            for name in (
                "prompt",
                "position",
                "plain",
                "drafted",
                "gap",
                "is_tie",
                "temperature",
                "seed",
            )
        }


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Give the index at which two token lists part, None if they are equal."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return None if len(first) == len(second) else min(len(first), len(second))


@dataclass(slots=True)
class TokenAudit:
    """Comparison under one rule.

    Attributes:
        target: The target.
        drafter: The drafter.
        prompts: Token lists.
        base: Sampling parameters but for temperature, rule and seed; tree shape included.
        rule: GREEDY, COUPLED or SAMPLE_MATCH.
        noise: The target's noise.
    """

    target: Target
    drafter: Drafter
    prompts: Sequence[Sequence[int]]
    base: SamplingParams
    rule: Rule
    noise: TargetNoise
    samples: int = 0
    tokens: int = 0
    rounds: int = 0
    committed: int = 0
    verified: int = 0
    accepted: int = 0
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, temperature: float, seed: int, *, is_chain: bool, max_batch: int) -> None:
        """Compare all prompts under one setting.

        Args:
            temperature: Temperature; 0 for greedy.
            seed: Seed of the first prompt; each prompt has one of its own.
            is_chain: Draft chains rather than trees.
            max_batch: Requests in a round of speculative decoding.
        """
        params = self.params(temperature, is_chain=is_chain)
        each = [replace(params, seed=seed + i) for i in range(len(self.prompts))]
        plain = Engine(self.target, config=EngineConfig(auto_off=False))
        config = EngineConfig(auto_off=False, max_batch=max_batch)
        drafting = Engine(self.target, drafter=self.drafter, config=config)
        expected = plain.generate(self.prompts, [replace(p, draft=False) for p in each])
        for index, result in enumerate(drafting.generate(self.prompts, each)):
            self._take(expected[index], result, each[index])
        shape = "chains" if is_chain else "trees"
        self.settings.append(f"T={temperature:g} seed {seed} {shape} batch {max_batch}")

    def params(self, temperature: float, *, is_chain: bool) -> SamplingParams:
        """Sampling parameters of a setting."""
        if temperature == 0:
            params = replace(self.base, temperature=0.0, rule="auto", top_k=0, top_p=1.0, min_p=0.0)
        else:
            params = replace(self.base, temperature=temperature, rule=self.rule.value)
        return replace(params, width=1) if is_chain else params

    def _take(
        self, plain: GenerationResult, drafted: GenerationResult, params: SamplingParams
    ) -> None:
        stats = drafted.stats
        self.rounds += stats.rounds
        self.committed += stats.committed
        self.verified += stats.verified
        self.accepted += stats.accepted
        if plain.error is not None:
            self.errors.append(f"plain decoding failed: {plain.error}")
            return
        if drafted.error is not None:
            self.errors.append(f"speculative decoding failed: {drafted.error}")
            return
        self.samples += 1
        at = first_difference(plain.token_ids, drafted.token_ids)
        self.tokens += len(plain.token_ids) if at is None else at
        if at is not None:
            self.differences.append(self._judge(plain, drafted, params, at))

    def _judge(
        self, plain: GenerationResult, drafted: GenerationResult, params: SamplingParams, at: int
    ) -> Difference:
        index = plain.prompt_index
        ours = plain.token_ids[at] if at < len(plain.token_ids) else None
        other = drafted.token_ids[at] if at < len(drafted.token_ids) else None
        gap: float | None = None
        if ours is not None and other is not None:
            gap = self._gap(index, plain.token_ids[:at], (ours, other), params)
        allowed = self.noise.tolerance / (params.temperature or 1.0)
        is_tie = allowed > 0 and gap is not None and abs(gap) <= allowed
        return Difference(
            prompt=index,
            position=at,
            plain=ours,
            drafted=other,
            gap=gap,
            is_tie=is_tie,
            temperature=params.temperature,
            seed=params.seed or 0,
        )

    def _gap(
        self, index: int, output: list[int], pair: tuple[int, int], params: SamplingParams
    ) -> float:
        """Value of the first token less that of the second after this output, plainly."""
        prompt = self.prompts[index]
        logits = fresh_logits(self.target, [*prompt, *output])[None]
        shaped = shape_logits(logits, [params], [History(prompt, output)])
        row = torch.full_like(shaped, -torch.inf)
        for token in pair:
            row[0, token] = shaped[0, token]
        if self.rule is Rule.GREEDY or params.temperature == 0:
            return float(row[0, pair[0]] - row[0, pair[1]])
        stream = Stream.COUPLED if self.rule is Rule.COUPLED else Stream.MATCH
        key = NoiseKey(params.seed or 0)
        ids, values = perturbed_topk(row, [key], [len(output)], 2, stream=stream)
        value = dict(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        return float(value.get(pair[0], -torch.inf) - value.get(pair[1], -torch.inf))

    def result(self) -> CheckResult:
        """What was seen."""
        real = [d for d in self.differences if not d.is_tie]
        ties = [d for d in self.differences if d.is_tie]
        status, evidence, advice = self._verdict(real, ties)
        tau = self.committed / self.rounds if self.rounds else 0.0
        return CheckResult(
            name=f"tokens, {self.rule.value}",
            status=status,
            evidence=evidence,
            power=self._power(),
            advice=advice,
            seconds=self.seconds,
            details={
                "rule": self.rule.value,
                "samples": self.samples,
                "same_tokens": self.tokens,
                "tau": tau,
                "judged_nodes": self.verified,
                "accepted_nodes": self.accepted,
                "ties": len(ties),
                "real_differences": len(real),
                "differences": [d.as_json() for d in [*real, *ties][:20]],
                "errors": self.errors[:8],
                "settings": self.settings,
                "tolerance": self.noise.tolerance,
            },
        )

    def _verdict(
        self, real: Sequence[Difference], ties: Sequence[Difference]
    ) -> tuple[Status, str, str]:
        if real:
            return Status.FOUND, self._describe(real), self._advice()
        broken = [error for error in self.errors if error.startswith("speculative")]
        if broken:
            return Status.FOUND, broken[0], "report it with the prompt and settings"
        if self.errors or not self.samples:
            evidence = self.errors[0] if self.errors else "nothing was compared"
            return Status.INCONCLUSIVE, evidence, "audit with prompts the target can answer"
        if not self.verified:
            return (
                Status.INCONCLUSIVE,
                f"nothing was drafted in {self.rounds} rounds, so nothing was put to the test",
                "audit with a drafter that drafts, and with prompts it can draft for",
            )
        tau = self.committed / max(self.rounds, 1)
        evidence = (
            f"{self.tokens} tokens of {self.samples} samples are plain decoding's; "
            f"{self.verified} drafted nodes judged, {self.accepted} accepted, tau {tau:.2f}"
        )
        if not self.accepted:
            evidence += ONLY_REJECTIONS
        if not ties:
            return Status.PASSED, evidence, ""
        gap = max(abs(d.gap or 0.0) for d in ties)
        evidence += (
            f"; {len(ties)} samples part at a numeric tie (gaps up to {gap:.2g}, noise "
            f"{self.noise.measured:.2g})"
        )
        return Status.PASSED, evidence, "use --exact if ties must fall as in plain decoding"

    def _describe(self, real: Sequence[Difference]) -> str:
        first = real[0]
        gap = "" if first.gap is None else f", value gap {first.gap:.3g}"
        return (
            f"{len(real)} of {self.samples} samples part from plain decoding; first in prompt "
            f"{first.prompt} at output position {first.position} (T={first.temperature:g}, seed "
            f"{first.seed}): {first.drafted} instead of {first.plain}{gap}, allowed "
            f"{self.noise.tolerance:.2g}"
        )

    def _advice(self) -> str:
        if self.target.exactness.enabled:
            return "do not trust this pair's text; report it with this report's JSON"
        return "audit with --exact: if it passes there, the kernels are noisier than measured"

    def _power(self) -> str:
        """Rule of three: no event in n trials bounds its rate at 2.3 / n with 90 %."""
        if not self.tokens or not self.verified:
            return ""
        return f"a fault that changes one token in {max(1, int(self.tokens / 2.3))} (90 %)"
