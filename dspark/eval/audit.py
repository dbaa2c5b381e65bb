"""Audit: is a pair of target and draft lossless, on this machine, as it is loaded?

Four kinds of check, each on the engine's own code:

1. trees and rollback (`audit_cache`): a tree's rows, and the step after a round, against a fresh
   prefill.
2. tokens (`audit_tokens`): greedy, coupled and sample-match decoding against plain decoding.
3. draws (`audit_draws`): every draw made again from the law that was recorded for it.
4. law (`audit_law`): thousands of samples against the target's law, with the power stated.

Work is done in turns until the time is up, so that every check has some of it; Ctrl-C keeps what
there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from dspark.draft.base import Drafter
from dspark.engine import Engine
from dspark.errors import ConfigError, DataError
from dspark.eval.audit_cache import RollbackAudit, TargetNoise, measure_noise
from dspark.eval.audit_contexts import TEXTS, choose_contexts, token_prompts
from dspark.eval.audit_draws import DrawRecorder
from dspark.eval.audit_law import LawAudit
from dspark.eval.audit_report import AuditReport
from dspark.eval.audit_tokens import TokenAudit
from dspark.eval.results import RunFacts, build_header
from dspark.request import Prompt, Rule, SamplingParams

__all__ = ["AuditConfig", "Level", "Progress", "audit", "default_prompts"]

_ALPHA = 1e-4  # chance of a false alarm of a whole audit, over all its law checks
_SHARES = {"tokens": 0.45, "law": 0.5}  # of the time; the rest goes to noise and rollback

Progress = Callable[[str, float, float], None]
"""Called with what runs now, the part of the time that is over, and seconds left."""


class Level(StrEnum):
    """How long an audit takes."""

    QUICK = "quick"
    NORMAL = "normal"
    THOROUGH = "thorough"


_LAW_TREES = {Level.QUICK: (2, 3), Level.NORMAL: (3, 5), Level.THOROUGH: (3, 5)}
_LAW_TOP_K = 8  # a law of few tokens shows a bias, and repeats its contexts, with few samples
_SECONDS = {Level.QUICK: 40.0, Level.NORMAL: 180.0, Level.THOROUGH: 1200.0}
_TOKENS = {Level.QUICK: 20, Level.NORMAL: 48, Level.THOROUGH: 64}
_PROMPTS = {Level.QUICK: 3, Level.NORMAL: 6, Level.THOROUGH: 6}
_CONTEXTS = {Level.QUICK: 2, Level.NORMAL: 4, Level.THOROUGH: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """How to audit.

    Attributes:
        level: How long, how many prompts and contexts.
        minutes: Time to take, > 0; None is the level's own. Every check gets at least one turn,
            so a slow target may take longer.
        rules: Rules to audit.
        temperatures: Temperatures > 0 of the sampling rules, one or more.
        top_k: Top-k of the sampling rules; None is no truncation for tokens, and 8 in the first
            law check (a law of few tokens shows a bias with fewer samples).
        top_p: Nucleus of the sampling rules, in (0, 1].
        min_p: Min-p of the sampling rules, in [0, 1].
        max_tokens: Tokens per sample of the token checks, >= 1; None is the level's own.
        depth: Longest drafted path, None for the default.
        width: Children per node at the most, None for the drafter's own choice.
        tree_budget: Drafted nodes per round, None for the default.
        turns: Turns of the token checks at the most, None for as many as there is time for.
        law_samples: Samples per law check at the most.
        seed: First seed.

    Raises:
        ConfigError: If a value is outside its range.
    """

    level: Level = Level.NORMAL
    minutes: float | None = None
    rules: tuple[Rule, ...] = tuple(Rule)
    temperatures: tuple[float, ...] = (0.7, 1.0)
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = None
    depth: int | None = None
    width: int | None = None
    tree_budget: int | None = None
    turns: int | None = None
    law_samples: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}, but must be > 0.")
        if not self.rules:
            raise ConfigError("no rule was given to audit, but at least one is needed.")
        bad = [t for t in self.temperatures if not 0 < t < float("inf")]
        if bad or not self.temperatures:
            raise ConfigError(
                f"temperatures are {self.temperatures}, but must be one or more numbers > 0.",
                hint="greedy decoding is a rule of its own: --rule greedy",
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}, but must be from 0 to 2**32 - 1.")
        if self.turns is not None and self.turns < 1:
            raise ConfigError(f"turns is {self.turns}, but must be >= 1.")
        if self.law_samples < 1:
            raise ConfigError(f"law_samples is {self.law_samples}, but must be >= 1.")
        self.sampling(Rule.GREEDY, 0.0)  # checks the rest

    @property
    def seconds(self) -> float:
        """Seconds to take."""
        return _SECONDS[self.level] if self.minutes is None else 60 * self.minutes

    def sampling(self, rule: Rule, temperature: float) -> SamplingParams:
        """Sampling parameters of the token checks under a rule."""
        return SamplingParams(
            max_tokens=_TOKENS[self.level] if self.max_tokens is None else self.max_tokens,
            temperature=temperature,
            rule="auto" if rule is Rule.GREEDY else rule.value,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            min_p=self.min_p,
            ignore_eos=True,
            seed=self.seed,
            depth=self.depth,
            width=self.width,
            tree_budget=self.tree_budget,
        )


def default_prompts(level: Level = Level.NORMAL) -> list[str]:
    """Texts to audit with where the user gives none."""
    return list(TEXTS[: _PROMPTS[level]])


@dataclass(slots=True)
class _Clock:
    """The time that an audit has."""

    seconds: float
    on_progress: Progress | None
    start: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def show(self, what: str) -> None:
        if self.on_progress is not None:
            done = min(1.0, self.elapsed() / self.seconds)
            self.on_progress(what, done, max(0.0, self.seconds - self.elapsed()))


def audit(
    engine: Engine,
    prompts: Sequence[Prompt] | None = None,
    config: AuditConfig | None = None,
    *,
    draft: str | None = None,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Audit an engine's target and drafter.

    Args:
        engine: The engine; it must be idle. It is not run itself: engines of the audit's own are
            made of its target and its drafter.
        prompts: Prompts to decode; None takes the project's own.
        config: How to audit.
        draft: What `Engine.load` was given as the draft, which the report's header then identifies
            by its files; None takes the drafter's own name.
        on_progress: Called as it goes.

    Returns:
        The report. After Ctrl-C it holds what there was, and says so.

    Raises:
        ConfigError: If the engine is busy.
        DataError: If a prompt cannot be used.
    """
    if engine.num_unfinished:
        raise ConfigError("the engine still runs requests, but must be idle to be audited.")
    own = AuditConfig() if config is None else config
    facts = RunFacts(
        target=engine.target.info.name,
        drafts=(engine.drafter.name if draft is None else draft,),
        template="raw",
        seed=own.seed,
    )
    report = AuditReport(header=build_header(engine, facts), settings=_settings(own))
    run = _Audit(engine, own, report, on_progress)
    return run.run(prompts)


class _Audit:
    """One audit."""

    def __init__(
        self,
        engine: Engine,
        config: AuditConfig,
        report: AuditReport,
        on_progress: Progress | None,
    ) -> None:
        self.target = engine.target
        self.drafter: Drafter = engine.drafter
        self.config = config
        self.engine = engine
        self.clock = _Clock(config.seconds, on_progress)
        self.report = report
        self.prompts: list[list[int]] = []
        self.rollback: RollbackAudit | None = None
        self.tokens: list[TokenAudit] = []
        self.laws: list[LawAudit] = []
        self.recorder = DrawRecorder(self.drafter, self.target.info.vocab_size)

    def run(self, prompts: Sequence[Prompt] | None) -> AuditReport:
        """Run all checks; see `audit`."""
        self.prompts = self._encode(prompts)
        try:
            self.clock.show("measuring the target's noise")
            noise = measure_noise(self.target, self.prompts[:2])
            self._run_rollback(noise)
            self._run_tokens(noise)
            self._run_laws()
        except KeyboardInterrupt:
            self.report.is_interrupted = True
        self._conclude()
        self.report.seconds = self.clock.elapsed()
        return self.report

    def _encode(self, prompts: Sequence[Prompt] | None) -> list[list[int]]:
        """Token lists of the prompts, cut where the target has too few positions."""
        given = prompts
        if given is None:
            given = default_prompts(self.config.level)
            if self.engine.codec is None:
                given = token_prompts(self.target.info.vocab_size, len(given))
        encoded = []
        for prompt in given:
            (request,) = self.engine.submit(prompt, SamplingParams(max_tokens=1, tree_budget=0))
            if request.error is not None:
                raise DataError(request.error, hint=request.hint)
            encoded.append(list(request.prompt))
            self.engine.cancel(request)
        if not encoded:
            raise DataError("there is no prompt to audit with.", hint="give at least one")
        return encoded

    # -- checks -------------------------------------------------------------------------------

    def _run_rollback(self, noise: TargetNoise) -> None:
        if not self.target.info.can_verify_trees:
            return
        self.rollback = RollbackAudit(self.target, noise, self.config.seed)
        is_quick = self.config.level is Level.QUICK
        for prompt in self.prompts[: 2 if is_quick else None]:
            self.clock.show("trees and rollback")
            start = time.perf_counter()
            if len(prompt) > 1:
                self.rollback.run(prompt, rounds=2 if is_quick else 3)
            self.rollback.seconds += time.perf_counter() - start

    def _run_tokens(self, noise: TargetNoise) -> None:
        """Turn by turn: every rule, other seeds, temperatures, shapes and batches each time."""
        config = self.config
        compared = (Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH)
        budget = config.tree_budget
        if budget is None:
            most = self.target.exactness.max_nodes
            budget = 15 if most is None else min(15, most)
        for rule in compared:
            if rule in config.rules:
                temperature = 0.0 if rule is Rule.GREEDY else 1.0
                base = replace(config.sampling(rule, temperature), tree_budget=budget)
                self.tokens.append(
                    TokenAudit(self.target, self.drafter, self.prompts, base, rule, noise)
                )
        share = _SHARES["tokens"]
        if not any(rule is not Rule.GREEDY for rule in config.rules):
            share = 1.0
        until = min(config.seconds, self.clock.elapsed() + share * config.seconds)
        for turn in self._turns(until):
            for check in self.tokens:
                self.clock.show(f"tokens, {check.rule.value}")
                start = time.perf_counter()
                self._token_turn(check, turn)
                check.seconds += time.perf_counter() - start
                if turn and self.clock.elapsed() > until:
                    return

    def _token_turn(self, check: TokenAudit, turn: int) -> None:
        temperatures = self.config.temperatures
        is_greedy = check.rule is Rule.GREEDY
        temperature = 0.0 if is_greedy else temperatures[turn % len(temperatures)]
        batch = (len(self.prompts), 1, 2)[turn % 3]
        seed = self.config.seed + 1000 * turn
        check.run(temperature, seed, is_chain=turn % 2 == 1, max_batch=batch)

    def _turns(self, until: float) -> Iterator[int]:
        """Turn numbers: the first one in any case, then until the time is up."""
        turn = 0
        while turn == 0 or self.clock.elapsed() < until:
            yield turn
            turn += 1
            # The greedy rule has nothing more to vary after six turns: shape times batch.
            most = self.config.turns
            if all(check.rule is Rule.GREEDY for check in self.tokens):
                most = 6 if most is None else min(6, most)
            if most is not None and turn >= most:
                return

    def _run_laws(self) -> None:
        self._open_laws()
        turn = 0
        while self.laws and (turn == 0 or self.clock.elapsed() < self.config.seconds):
            for check in self.laws:
                self.clock.show(f"law, {check.rule.value}")
                if check.samples >= self.config.law_samples:
                    continue
                # What tokens have proven already needs fewer samples.
                if turn % 4 and not check.rule.draws_from_laws:
                    continue
                start = time.perf_counter()
                check.run(turn)
                if turn == 0 and check.rule.draws_from_laws:
                    check.probe_ties()
                check.seconds += time.perf_counter() - start
                if turn and self.clock.elapsed() >= self.config.seconds:
                    return
            turn += 1
            if all(check.samples >= self.config.law_samples for check in self.laws):
                return

    def _open_laws(self) -> None:
        rules = [rule for rule in self.config.rules if rule is not Rule.GREEDY]
        if not rules or not self.target.info.can_verify_trees:
            return
        self.clock.show("choosing contexts")
        settings = self._law_settings()
        contexts = choose_contexts(
            self.target,
            self.drafter,
            self.prompts,
            count=_CONTEXTS[self.config.level],
            params=settings[0],
        )
        for params in settings:
            for rule in rules:
                own = replace(params, rule=rule.value)
                if rule is Rule.BLOCK:
                    own = replace(own, width=1, tree_budget=own.depth)
                self.laws.append(
                    LawAudit(self.target, self.recorder, contexts, own, self.config.seed)
                )

    def _law_settings(self) -> list[SamplingParams]:
        """Sampling of the law checks: one setting when quick, two else."""
        config = self.config
        depth, nodes = _LAW_TREES[config.level]
        depth = depth if config.depth is None else config.depth
        nodes = nodes if config.tree_budget is None else config.tree_budget
        base = replace(
            config.sampling(Rule.COUPLED, config.temperatures[-1]),
            max_tokens=depth + 2,
            depth=depth,
            width=2 if config.width is None else config.width,
            tree_budget=max(1, nodes),
        )
        is_own = config.top_k is not None or config.top_p < 1 or config.min_p > 0
        settings = [base if is_own else replace(base, top_k=_LAW_TOP_K)]
        if config.level is not Level.QUICK:
            settings.append(replace(base, temperature=config.temperatures[0]))
        return [own for i, own in enumerate(settings) if own not in settings[:i]]

    # -- the end ------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """Turn what there is into results."""
        checks = self.report.checks
        if self.rollback is not None:
            has_seen = self.rollback.rounds > 0 or bool(self.rollback.faults)
            if has_seen or not self.report.is_interrupted:
                checks.append(self.rollback.result())
        checks.extend(check.result() for check in self.tokens if check.samples or check.errors)
        started = [check for check in self.laws if check.samples or check.errors]
        drawn = list(dict.fromkeys(c.rule for c in started if c.rule.draws_from_laws))
        if drawn:
            start = time.perf_counter()
            self.recorder.check()
            checks.append(self.recorder.result(drawn, time.perf_counter() - start))
        checks.extend(check.result(_ALPHA / max(1, len(started))) for check in started)


def _settings(config: AuditConfig) -> dict[str, object]:
    out = asdict(config)
    out["level"] = config.level.value
    out["rules"] = [rule.value for rule in config.rules]
    out["seconds"] = config.seconds
    out["alpha"] = _ALPHA
    return out
