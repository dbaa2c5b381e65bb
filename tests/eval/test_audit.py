"""The audit passes on the real code for every rule and drafter, and finds planted faults."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import typer
from typer.testing import CliRunner

import dspark
from dspark.adapters.hf.target import HFTarget
from dspark.commands import audit as audit_command
from dspark.draft.base import Drafter
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupConfig, LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.errors import ConfigError, DataError
from dspark.eval import audit as audit_module
from dspark.eval import audit_law, chi_square
from dspark.eval.audit import AuditConfig, Level, audit
from dspark.eval.audit_cache import TargetNoise, measure_noise
from dspark.eval.audit_law import lenient_law, plain_law
from dspark.eval.audit_report import AuditReport, CheckResult, Status
from dspark.eval.audit_tokens import TokenAudit
from dspark.eval.report.read import read_inputs
from dspark.request import Rule, SamplingParams
from dspark.verify.sampling import laws, shape_logits
from tests.conftest import VOCAB, random_target
from tests.eval import planted, toys
from tests.eval.toys import toy_pair

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [20, 21, 22, 23] * 6]
COMPARED = (Rule.GREEDY, Rule.COUPLED, Rule.SAMPLE_MATCH)
DRAWN = (Rule.REJECTION, Rule.BLOCK)


TOYS = toy_pair()
WOULD_CATCH = {"total_variation", "lenient_acceptance"}


@pytest.fixture(autouse=True)
def _few_ties(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for near-ties takes time that only one of the tests needs."""
    if "bf16" not in request.node.name:
        monkeypatch.setattr(audit_law, "_TIES_TRIED", 200)


@functools.cache
def small_target(*, exact: bool = True) -> HFTarget:
    return random_target("llama", layers=1, exact=exact)


def model_drafter(*, is_toy: bool = True) -> ModelDrafter:
    draft = TOYS[1] if is_toy else random_target("llama", layers=2, exact=False)
    return ModelDrafter(draft, vocab_size=draft.info.vocab_size)


def lookup() -> LookupDrafter:
    """A lookup drafter that nearly always has something to offer, though seldom the right thing."""
    corpus = [np.random.default_rng(0).integers(3, toys.VOCAB, 400).tolist()]
    return LookupDrafter(LookupConfig(min_match=1), corpus=corpus)


def drafter(name: str) -> Drafter:
    if name == "lookup":
        return lookup()
    model = model_drafter(is_toy=name != "small model")
    return CombinedDrafter(lookup(), model) if name == "combined" else model


def run(
    draft: str = "model",
    *,
    rules: tuple[Rule, ...] = tuple(Rule),
    samples: int = 192,
    exact: bool = True,
    **options: object,
) -> AuditReport:
    """An audit whose extent does not depend on the machine's speed."""
    settings = {"turns": 1, "minutes": 30, "max_tokens": 12, "temperatures": (0.7,)}
    config = AuditConfig(
        level=Level.QUICK, rules=rules, law_samples=samples, **{**settings, **options}
    )
    target = small_target(exact=exact) if draft == "small model" else TOYS[0]
    prompts = PROMPTS if draft == "small model" else [[t % toys.VOCAB for t in p] for p in PROMPTS]
    return audit(dspark.Engine(target, drafter=drafter(draft)), prompts, config)


def by_name(report: AuditReport) -> dict[str, CheckResult]:
    return {check.name: check for check in report.checks}


def found(report: AuditReport) -> set[str]:
    return {check.name for check in report.checks if check.status is Status.FOUND}


@pytest.mark.parametrize(
    "draft",
    [
        "small model",
        "combined",  # which has those below in it
        pytest.param("lookup", marks=pytest.mark.slow),
        pytest.param("model", marks=pytest.mark.slow),
    ],
)
def test_the_real_code_passes_under_every_rule(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_toy = draft != "small model"  # a real model is there for its cache, more than for rules
    rules = tuple(Rule) if is_toy else (Rule.GREEDY, Rule.REJECTION)
    if not is_toy:
        monkeypatch.setattr(audit_module, "_CONTEXTS", dict.fromkeys(Level, 1))
    drawn = [rule for rule in DRAWN if rule in rules]
    draws = f"draws, {' and '.join(rule.value for rule in drawn)}"
    report = run(draft, rules=rules, samples=128 if is_toy else 64)
    checks = by_name(report)
    text = "\n".join(report.lines())
    assert set(checks) == {
        "trees and rollback",
        draws,
        *(f"tokens, {rule.value}" for rule in COMPARED if rule in rules),
        *(f"law, {rule.value}" for rule in rules if rule is not Rule.GREEDY),
    }, text
    assert {check.status for check in report.checks} == {Status.PASSED}, text
    assert report.exit_code == 0
    for rule in drawn:
        assert checks[f"law, {rule.value}"].details["judged_nodes"] > 0
        assert "% of the mass" in checks[f"law, {rule.value}"].power
        assert set(checks[f"law, {rule.value}"].details["would_catch"]) == WOULD_CATCH
    if draft != "lookup":
        assert checks[draws].details["draws"] > 100
    if "model" not in draft:
        assert checks[draws].details["certain_candidates"] > 0


@pytest.mark.parametrize(
    ("plant", "rules", "samples", "expected"),
    [
        (planted.no_residual, (Rule.BLOCK,), 384, {"law, block"}),
        pytest.param(
            planted.no_residual, (Rule.REJECTION,), 384, {"law, rejection"}, marks=pytest.mark.slow
        ),
        (planted.warm_draws, DRAWN, 64, {"draws, rejection and block"}),
        (planted.cold_target, (Rule.COUPLED,), 64, {"tokens, coupled"}),
        pytest.param(
            planted.cold_target, (Rule.REJECTION,), 256, {"law, rejection"}, marks=pytest.mark.slow
        ),
        (planted.bf16_draws, (Rule.REJECTION,), 64, {"draws, rejection"}),
        pytest.param(
            planted.bf16_draws, (Rule.BLOCK,), 64, {"draws, block"}, marks=pytest.mark.slow
        ),
        (planted.noise_reused, (Rule.COUPLED,), 64, {"law, coupled"}),
        pytest.param(
            planted.noise_reused, (Rule.REJECTION,), 64, {"law, rejection"}, marks=pytest.mark.slow
        ),
        (planted.rejected_rows_kept, (Rule.GREEDY,), 64, {"trees and rollback"}),
        (planted.everything_committed, (Rule.GREEDY,), 64, {"trees and rollback"}),
        (planted.closing_from_the_draft, (Rule.GREEDY,), 64, {"tokens, greedy"}),
        (planted.closing_from_the_draft, (Rule.COUPLED,), 64, {"tokens, coupled"}),
        pytest.param(
            planted.closing_from_the_draft,
            DRAWN,
            256,
            {"law, rejection", "law, block"},
            marks=pytest.mark.slow,
        ),
        (planted.lenient(0.5), (Rule.REJECTION,), 384, {"law, rejection"}),
        (planted.picky_children, (Rule.REJECTION,), 64, {"draws, rejection"}),
    ],
)
def test_a_planted_fault_is_found(
    plant: planted.Plant,
    rules: tuple[Rule, ...],
    samples: int,
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One context, which then has all of the samples.
    monkeypatch.setattr(audit_module, "_CONTEXTS", dict.fromkeys(Level, 1))
    plant(monkeypatch)
    needs_a_model = expected <= {"trees and rollback", "tokens, greedy"}
    report = run("small model" if needs_a_model else "model", rules=rules, samples=samples)
    assert expected <= found(report), "\n".join(report.lines())
    assert report.exit_code == 3


# -- what is not proof is not called proof ---------------------------------------------------------


class Failing:
    """A drafter that breaks."""

    name = "failing"
    capture = ()

    def propose(self, contexts):
        raise ValueError("broken on purpose")

    def release(self, request_id):
        pass


def test_a_run_in_which_nothing_was_drafted_is_inconclusive() -> None:
    engine = dspark.Engine(small_target())
    config = AuditConfig(
        level=Level.QUICK, turns=1, max_tokens=4, rules=(Rule.GREEDY, Rule.BLOCK), law_samples=64
    )
    report = audit(engine, PROMPTS[:1], config)
    checks = by_name(report)
    assert checks["tokens, greedy"].status is Status.INCONCLUSIVE
    assert "nothing was drafted" in checks["tokens, greedy"].evidence
    assert checks["law, block"].status is Status.INCONCLUSIVE
    assert report.status is Status.INCONCLUSIVE
    assert report.exit_code == 3
    assert "nothing was proven" in report.lines()[-1]


def test_a_drafter_that_fails_is_named_and_costs_nothing_but_the_proof(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = dspark.Engine(small_target(), drafter=Failing())
    config = AuditConfig(
        level=Level.QUICK, turns=1, max_tokens=4, rules=(Rule.REJECTION,), law_samples=64
    )
    report = audit(engine, PROMPTS[:1], config)
    draws = by_name(report)["draws, rejection"]
    assert draws.status is Status.INCONCLUSIVE
    assert "broken on purpose" in draws.evidence
    assert report.status is Status.INCONCLUSIVE


def test_ctrl_c_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = TokenAudit.run

    def once(self, *args, **options):
        if self.rule is Rule.COUPLED:
            raise KeyboardInterrupt
        compare(self, *args, **options)

    monkeypatch.setattr(TokenAudit, "run", once)
    report = run(max_tokens=4)
    assert report.is_interrupted
    assert report.exit_code == 130
    assert {check.name for check in report.checks} == {"trees and rollback", "tokens, greedy"}
    assert "partial" in report.lines()[-1]


def test_the_engine_must_be_idle_and_prompts_usable() -> None:
    engine = dspark.Engine(small_target())
    with pytest.raises(DataError, match="outside the vocabulary"):
        audit(engine, [[VOCAB]])
    engine.submit([5, 6])
    with pytest.raises(ConfigError, match="idle"):
        audit(engine, PROMPTS)


@pytest.mark.parametrize(
    "options",
    [{"minutes": 0}, {"rules": ()}, {"temperatures": (0.0,)}, {"seed": -1}, {"max_tokens": 0}],
)
def test_settings_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AuditConfig(**options)


# -- ties and noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("tolerance", "is_tie"), [(1e3, True), (1e-9, False), (0.0, False)])
def test_a_difference_is_a_tie_only_within_the_noise(
    temperature: float, tolerance: float, is_tie: bool
) -> None:
    target = small_target()
    noise = TargetNoise(measured=tolerance / 4, tolerance=tolerance, contexts=1)
    rule = Rule.COUPLED if temperature else Rule.GREEDY
    base = SamplingParams(max_tokens=6, seed=1, temperature=temperature)
    check = TokenAudit(target, lookup(), PROMPTS, base, rule, noise)
    plain, drafted = (dspark.Engine(target).generate(PROMPTS, base) for _ in range(2))
    drafted[1].token_ids[3] = (drafted[1].token_ids[3] + 1) % VOCAB
    drafted[1].stats.verified = 5
    for a, b in zip(plain, drafted, strict=True):
        check._take(a, b, base)
    (difference,) = check.differences
    assert (difference.prompt, difference.position) == (1, 3)
    assert difference.gap > 0  # plain decoding's token has the larger value
    assert difference.is_tie is is_tie
    result = check.result()
    assert result.status is (Status.PASSED if is_tie else Status.FOUND)
    assert ("numeric tie" in result.evidence) is is_tie


def test_exact_mode_has_no_noise_and_no_tolerance() -> None:
    noise = measure_noise(small_target(), PROMPTS)
    assert noise.measured == 0
    assert noise.tolerance == 0


def test_without_exact_mode_the_audit_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_CONTEXTS", dict.fromkeys(Level, 1))
    report = run("small model", exact=False, rules=(Rule.GREEDY, Rule.COUPLED), samples=64)
    assert not found(report), "\n".join(report.lines())


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [1, 7, 300])
def test_tails_are_scipys(dof: int) -> None:
    value = chi_square.critical_value(1e-5, dof)
    assert value == pytest.approx(scipy.stats.chi2.isf(1e-5, dof), rel=1e-9)
    power = chi_square.noncentral_tail(value, dof, 40.0)
    assert power == pytest.approx(scipy.stats.ncx2.sf(value, dof, 40.0), rel=1e-6)
    shift = chi_square.detectable_shift(1e-5, dof)
    assert scipy.stats.ncx2.sf(value, dof, shift) == pytest.approx(0.9, abs=1e-6)


def test_rare_tokens_share_a_bin_and_impossible_ones_are_found() -> None:
    law = np.array([0.5, 0.3, 0.1, 0.06, 0.04, 0.0])
    test = chi_square.compare_counts({0: 52, 1: 31, 2: 9, 3: 5, 4: 3}, law)
    assert test.bins == (0, 1, 2)
    assert test.dof == 3
    expected = scipy.stats.chisquare([52, 31, 9, 8], [50, 30, 10, 10])
    assert test.p_value == pytest.approx(expected.pvalue)
    assert chi_square.compare_counts({0: 99, 5: 1}, law).p_value == 0
    assert chi_square.compare_counts({0: 3}, law).dof == 0


def test_p_values_of_the_right_law_are_even_and_power_is_as_stated() -> None:
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.ones(30))
    other = lenient_law(law, rng.dirichlet(np.ones(30)), 0.5)
    n, level = 2000, 0.01
    right = [chi_square.compare_counts(_draw(rng, law, n), law) for _ in range(400)]
    assert scipy.stats.kstest([test.p_value for test in right], "uniform").pvalue > 1e-3
    value = chi_square.critical_value(level, right[0].dof)
    stated = chi_square.noncentral_tail(value, right[0].dof, right[0].shift(other))
    seen = [chi_square.compare_counts(_draw(rng, other, n), law).p_value for _ in range(400)]
    assert np.mean(np.array(seen) < level) == pytest.approx(stated, abs=0.08)


def _draw(rng: np.random.Generator, law: np.ndarray, count: int) -> dict[int, int]:
    return dict(enumerate(rng.multinomial(count, law).tolist()))


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.6}]
)
def test_the_audits_own_law_is_the_verifiers(options: dict[str, float]) -> None:
    logits = 2 * np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32)
    params = SamplingParams(temperature=0.7, **options)
    theirs = laws(shape_logits(torch.from_numpy(logits), [params] * 4)).numpy()
    ours = np.stack([plain_law(row.astype(np.float64), params) for row in logits])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ((ours > 0) == (theirs > 0)).all()


def test_acceptance_without_excess_keeps_the_law() -> None:
    a, b = np.random.default_rng(2).dirichlet(np.ones(9), size=2)
    np.testing.assert_allclose(lenient_law(a, b, 0.0), a, atol=1e-15)
    assert np.abs(lenient_law(a, b, 0.1) - a).sum() > 1e-3
    assert lenient_law(a, b, 0.1).sum() == pytest.approx(1)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command over a tiny engine, with little to do."""
    engine = dspark.Engine(small_target(), drafter=model_drafter(is_toy=False))
    monkeypatch.setattr(audit_command.ui, "load_engine", lambda *_, **__: engine)
    monkeypatch.setattr(audit_module, "_SECONDS", dict.fromkeys(Level, 0.01))
    app = typer.Typer()
    app.command()(audit_command.audit)
    return app


def test_the_command_prints_lines_or_json_and_writes_a_file(
    command: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--level", "quick", "--rule", "greedy", "--max-tokens", "6"]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("passed        trees and rollback")
    assert "no loss was found (2 passed;" in shown.stdout
    path = tmp_path / "report.json"
    shown = CliRunner().invoke(command, [*arguments, "--json", "--out", str(path)])
    report = json.loads(shown.stdout)
    assert report == json.loads(path.read_text())
    assert (report["schema"], report["version"], report["status"]) == ("dspark.audit", 1, "passed")
    assert report["settings"]["rules"] == ["greedy"]
    assert report["header"]["target"]["id"] == "random-llama"
    assert read_inputs([path]).audit[0].results.header.seed == 0
    planted.closing_from_the_draft(monkeypatch)
    assert CliRunner().invoke(command, arguments).exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--level", "deep"], ConfigError),
        (["--rule", "luck"], ConfigError),
        (["--temperature", "0"], ConfigError),
        (["--out", "/no/such/folder/report.json"], DataError),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    command: typer.Typer, arguments: list[str], error: type[Exception]
) -> None:
    assert isinstance(CliRunner().invoke(command, arguments).exception, error)
