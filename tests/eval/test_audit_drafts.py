"""The audit of drafters that read hidden states: it passes on the real code and finds faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import dspark
from dspark.base_model import cache as v4_cache
from dspark.base_model.mtp_drafter import MTPDrafter
from dspark.draft import grow
from dspark.draft.base import Drafter
from dspark.draft.draft_cache import ContextCache
from dspark.draft.eagle3_state import DraftState
from dspark.eval import audit_law
from dspark.eval.audit import AuditConfig, Level, audit
from dspark.eval.audit_cache import RollbackAudit
from dspark.eval.audit_report import AuditReport, Status
from dspark.eval.audit_tokens import TokenAudit
from dspark.request import Rule
from dspark.target import Target
from dspark.verify import rules as verify_rules
from dspark.verify import verifier
from tests.base_model import law_models as v4
from tests.draft import law_models
from tests.draft.law_check import best_drafts, drafts_share_noise, law_of_other_tokens
from tests.eval import planted

pytestmark = pytest.mark.slow  # the audit on eight kinds of drafts takes a minute

PROMPTS = [[2, 5, 3, 1, 0, 4] * 2, [4, 0, 1] * 6]
DRAWN = (Rule.REJECTION, Rule.BLOCK)
DRAWS = "draws, rejection and block"


@pytest.fixture(autouse=True)
def _few_ties(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for near-ties takes time that only one of the tests needs."""
    if "bf16" not in request.node.name:
        monkeypatch.setattr(audit_law, "_TIES_TRIED", 100)


TARGETS = {"rnn": "gemma3", "eagle3, few": "gemma3", "gated": "qwen3", "eagle3": "qwen3"}
"""Targets of drafts for wrapped models; llama where nothing is said."""


def pair_of(kind: str) -> tuple[Target, Drafter]:
    """A target and a draft that agrees with it in part."""
    if kind in v4.KINDS:
        return v4.target_of(kind), v4.drafter_of(kind)
    return law_models.target_of(TARGETS.get(kind, "llama")), law_models.drafter_of(kind)


def run(
    kind: str, *, rules: tuple[Rule, ...] = tuple(Rule), samples: int = 64, **options: object
) -> AuditReport:
    """An audit whose extent does not depend on the machine's speed."""
    settings = {"turns": 1, "minutes": 30, "max_tokens": 8, "temperatures": (1.3,)}
    config = AuditConfig(
        level=Level.QUICK, rules=rules, law_samples=samples, **{**settings, **options}
    )
    target, drafter = pair_of(kind)
    return audit(dspark.Engine(target, drafter=drafter), PROMPTS, config)


def found(report: AuditReport) -> set[str]:
    return {check.name for check in report.checks if check.status is Status.FOUND}


def assert_passed(report: AuditReport) -> None:
    text = "\n".join(report.lines())
    assert {check.status for check in report.checks} == {Status.PASSED}, text
    assert report.exit_code == 0


SLOW = pytest.mark.slow
WHOLE = [
    "vanilla",
    pytest.param("gated", marks=SLOW),
    pytest.param("rnn, few", marks=SLOW),
    pytest.param("dflash", marks=SLOW),
    "eagle3",
    pytest.param("eagle3, few", marks=SLOW),
    pytest.param("mtp", marks=SLOW),
    pytest.param("dspark", marks=SLOW),
]


@pytest.mark.parametrize("kind", WHOLE)
def test_the_real_code_passes_under_every_rule(kind: str) -> None:
    report = run(kind)
    assert_passed(report)
    checks = {check.name: check for check in report.checks}
    assert len(checks) == 9
    assert checks[DRAWS].details["draws"] > 100
    for name, check in checks.items():
        if name.startswith(("tokens", "law")):
            assert 0 < check.details["accepted_nodes"] < check.details["judged_nodes"]


def test_in_exact_mode_it_passes_bit_by_bit() -> None:
    target = law_models.target_of("qwen3", 40, exact=True)
    engine = dspark.Engine(target, drafter=law_models.drafter_of("rnn, few", 40))
    rules = (Rule.GREEDY, Rule.REJECTION)
    config = AuditConfig(
        level=Level.QUICK, turns=1, minutes=30, max_tokens=12, rules=rules, law_samples=64
    )
    report = audit(engine, [[20, 35, 3, 1, 0, 4] * 2, [4, 30, 1] * 6], config)
    assert_passed(report)
    assert report.checks[0].details["tolerance"] == 0
    assert "bitwise" in report.checks[0].evidence


def test_shallow_trees_near_the_end_of_a_text_are_no_fault() -> None:
    """The anchor has more children where paths must be short, whatever the noise."""
    report = run("vanilla", rules=(Rule.REJECTION,), width=4, tree_budget=4, depth=4)
    assert_passed(report)


# -- faults ----------------------------------------------------------------------------------------


def first_rows_kept(patch: pytest.MonkeyPatch) -> None:
    """V4's cache keeps the first rows of a tree, as many as were accepted."""
    keep = v4_cache._into_ring

    def first(pool, stage, ring, rows, length):
        keep(pool, stage, ring, np.arange(len(rows)), length)

    patch.setattr(v4_cache, "_into_ring", first)


def cut_after_the_draw(patch: pytest.MonkeyPatch) -> None:
    """A chain ends before a second token that the draft found unlikely once it was drawn."""
    propose = grow.DrawnGrowth.proposal

    def proposal(self):
        whole = propose(self)
        tree = whole.tree
        own = [float(whole.laws[law, t]) for law, t in zip(whole.law_of, tree.token, strict=True)]
        keep = np.array([own[node] > 0.2 or node == 0 for node in range(tree.num_nodes)])
        return whole.subtree(np.logical_and.accumulate(keep))

    patch.setattr(grow.DrawnGrowth, "proposal", proposal)


ROLLBACK = "trees and rollback"
GREEDY, COUPLED, REJECTION, BLOCK = Rule.GREEDY, Rule.COUPLED, Rule.REJECTION, Rule.BLOCK


@pytest.mark.parametrize(
    ("plant", "kind", "rules", "samples", "expected"),
    [
        (planted.no_residual, "eagle3, few", (REJECTION,), 256, {"law, rejection"}),
        pytest.param(planted.no_residual, "mtp", (BLOCK,), 256, {"law, block"}, marks=SLOW),
        (best_drafts, "eagle3", (REJECTION,), 64, {"draws, rejection"}),
        (law_of_other_tokens, "rnn, few", (BLOCK,), 64, {"draws, block"}),
        (planted.warm_draws, "dspark", (REJECTION,), 64, {"draws, rejection"}),
        (planted.bf16_draws, "dflash", (BLOCK,), 64, {"draws, block"}),
        pytest.param(planted.bf16_draws, "mtp", (REJECTION,), 64, {"draws, rejection"}, marks=SLOW),
        (drafts_share_noise, "dflash", (REJECTION,), 64, {"draws, rejection"}),
        (planted.noise_reused, "eagle3", (COUPLED,), 64, {"law, coupled"}),
        (planted.noise_reused, "dspark", (BLOCK,), 64, {"law, block"}),
        (planted.closing_from_the_draft, "rnn", (GREEDY,), 64, {"tokens, greedy"}),
        pytest.param(
            planted.closing_from_the_draft,
            "dspark",
            (COUPLED,),
            64,
            {"tokens, coupled"},
            marks=SLOW,
        ),
        pytest.param(
            planted.closing_from_the_draft, "rnn", DRAWN, 768, {"law, rejection"}, marks=SLOW
        ),
        pytest.param(planted.closing_from_the_draft, "mtp", DRAWN, 768, {"law, block"}, marks=SLOW),
        (planted.cold_target, "vanilla", (COUPLED,), 64, {"tokens, coupled"}),
        (planted.rejected_rows_kept, "eagle3, few", (GREEDY,), 64, {ROLLBACK}),
        (first_rows_kept, "mtp", (GREEDY,), 64, {ROLLBACK}),
        (planted.picky_children, "gated", (BLOCK,), 64, {"draws, block"}),
        pytest.param(cut_after_the_draw, "mtp", (BLOCK,), 64, {"draws, block"}, marks=SLOW),
        (cut_after_the_draw, "vanilla", (BLOCK,), 64, {"draws, block"}),
    ],
)
def test_a_planted_fault_is_found(
    plant: planted.Plant,
    kind: str,
    rules: tuple[Rule, ...],
    samples: int,
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    report = run(kind, rules=rules, samples=samples)
    assert expected <= found(report), "\n".join(report.lines())
    assert report.exit_code == 3


# -- what only costs drafts ------------------------------------------------------------------------


def block_rows_kept(patch: pytest.MonkeyPatch) -> list[int]:
    """DSpark's cache takes the K/V of every block, drafted as it is, for context."""
    with_block, kept = ContextCache.with_block, []

    def keep(self, layer, key, value, reach):
        out = with_block(self, layer, key, value, reach)
        self._layers[layer].stop += key.shape[0]
        kept.append(key.shape[0])
        return out

    patch.setattr(ContextCache, "with_block", keep)
    patch.setattr(ContextCache, "truncate", lambda *_: None)
    return kept


def drafted_columns_kept(patch: pytest.MonkeyPatch) -> list[int]:
    """EAGLE-3's K/V of the last level that was drafted stay, whether accepted or not."""
    write, note, kept, drafted = DraftState.write, DraftState.note, [], {}

    def remember(self, keys, values, behind=None):
        write(self, keys, values, behind or 0)
        if behind is not None:
            drafted[id(self)] = behind + keys.shape[0]

    def keep(self, tokens):
        kept.append(drafted.pop(id(self), 0) if self.seen else 0)
        self.length += kept[-1]
        note(self, tokens)

    patch.setattr(DraftState, "write", remember)
    patch.setattr(DraftState, "note", keep)
    return kept


def drafted_pairs_committed(patch: pytest.MonkeyPatch) -> list[int]:
    """MTP-1's cache commits the first row of every tree."""
    propose, kept = MTPDrafter.propose, []

    def keep(self, contexts):
        proposals = propose(self, contexts)
        for context in contexts:
            slot = self._tracks[context.request_id].slot
            if self._cache.state(slot).pending is not None:
                self._cache.commit(slot, [0])
                kept.append(1)
        return proposals

    patch.setattr(MTPDrafter, "propose", keep)
    return kept


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("vanilla", block_rows_kept),
        ("eagle3", drafted_columns_kept),
        ("mtp", drafted_pairs_committed),
    ],
)
def test_a_draft_cache_that_is_not_rolled_back_is_no_loss(
    kind: str, plant: Callable[[pytest.MonkeyPatch], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs acceptance: what is drafted differs, and what comes out has the target's law."""
    clean = decode(kind)
    kept = plant(monkeypatch)
    texts, accepted = decode(kind)
    assert texts == clean[0]
    assert accepted != clean[1]
    assert_passed(run(kind, rules=(Rule.REJECTION,)))
    assert sum(kept) > 50


def decode(kind: str) -> tuple[list[list[int]], list[int]]:
    """Texts under the coupled rule, and how many drafted tokens were accepted for each."""
    target, drafter = pair_of(kind)
    config = dspark.EngineConfig(auto_off=False)
    params = dspark.SamplingParams(max_tokens=16, temperature=1.0, seed=1, n=2, ignore_eos=True)
    results = dspark.Engine(target, drafter=drafter, config=config).generate(PROMPTS, params)
    return [r.token_ids for r in results], [r.stats.accepted for r in results]


# -- Ctrl-C ----------------------------------------------------------------------------------------


def test_a_difference_seen_before_ctrl_c_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.closing_from_the_draft(monkeypatch)
    judge = TokenAudit._judge

    def once(self, *args):
        if self.differences:
            raise KeyboardInterrupt
        return judge(self, *args)

    monkeypatch.setattr(TokenAudit, "_judge", once)
    report = run("rnn", rules=(Rule.GREEDY,), max_tokens=16)
    assert report.is_interrupted
    assert "tokens, greedy" in found(report), "\n".join(report.lines())


def test_ctrl_c_before_the_first_round_is_not_called_a_short_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RollbackAudit, "_round", interrupted)
    report = run("vanilla", rules=(Rule.GREEDY,))
    assert report.is_interrupted
    assert not report.checks


# -- what was not seen -----------------------------------------------------------------------------


def test_drafts_that_are_never_accepted_are_said_to_prove_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = run("rnn", rules=(Rule.GREEDY, Rule.REJECTION))
    assert not any("only rejections" in check.evidence for check in report.checks)
    monkeypatch.setattr(verifier, "walk_targets", lambda _, targets: ((), (1,), targets[0]))
    monkeypatch.setattr(
        verifier,
        "walk_rejection",
        lambda proposal, law, uniform: verify_rules.Walk((), (1,), law(0)),
    )
    report = run("rnn", rules=(Rule.GREEDY, Rule.REJECTION))
    said = {check.name for check in report.checks if "only rejections" in check.evidence}
    assert said == {"tokens, greedy", "law, rejection"}
