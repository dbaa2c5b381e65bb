"""Under a constraint the output has the masked target's law: every rule, tree shape and drafter.

The law of every text is computed from the target's table and the masks; nothing here needs
llguidance. Each kind of fault has a test that sees it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dspark import round_draft
from dspark.draft import grow
from dspark.request import SamplingParams
from tests.draft.law_check import ALPHA, PROCESSORS
from tests.grammar.toys import END, PROMPT, Automaton, drafter_of, engine_of, laws_of, p_value

SHAPES = {
    "chain": {"tree_budget": 5, "depth": 5, "width": 1},
    "tree": {"tree_budget": 10, "depth": 4, "width": 3},
    "one node": {"tree_budget": 1},
}
CELLS = [
    ("coupled", "tree", "model", "plain"),
    ("coupled", "chain", "lookup", "hot"),
    ("sample-match", "tree", "anchor-bound", "plain"),
    ("sample-match", "chain", "none", "hot"),
    ("rejection", "chain", "model", "plain"),
    ("rejection", "tree", "combined", "both"),
    ("rejection", "tree", "anchor-bound", "plain"),
    ("rejection", "tree", "anchor-bound combined", "hot"),
    ("rejection", "tree", "lookup", "top-k"),
    ("rejection", "one node", "model", "hot"),
    ("rejection", "tree", "unaware", "hot"),
    ("rejection", "chain", "stubborn", "plain"),
    ("block", "chain", "model", "plain"),
    ("block", "chain", "anchor-bound", "top-p"),
    ("block", "chain", "combined", "hot"),
    ("block", "chain", "unaware", "hot"),
]
"""Every rule, shape, drafter and kind of processors; under rules that draw, every drafter."""

SLOW_ONLY = [
    ("coupled", "chain", "lookup", "hot"),
    ("rejection", "chain", "model", "plain"),
    ("sample-match", "chain", "none", "hot"),
    ("rejection", "tree", "anchor-bound", "plain"),
    ("rejection", "tree", "unaware", "hot"),
    ("block", "chain", "model", "plain"),
    ("block", "chain", "combined", "hot"),
]
"""Cells whose every part is in another one, too."""


def params_of(rule: str, shape: str, processors: str, **options) -> SamplingParams:
    values = {"rule": rule, "max_tokens": 6, **SHAPES[shape], **PROCESSORS[processors], **options}
    return SamplingParams(**values)


def sampled(
    rule: str, shape: str, drafter: str, processors: str, count: int, **options
) -> tuple[float, int]:
    """The p-value of `count` texts, and how many drafted tokens were accepted or rejected, if less.

    Tokens that the grammar forced are left out of this.
    """
    params = params_of(rule, shape, processors, **{"grammar": Automaton(), **options})
    each = [replace(params, seed=seed) for seed in range(count)]
    results = engine_of(drafter_of(drafter)).generate([list(PROMPT)] * count, each)
    assert all(result.error is None for result in results)
    offered = sum(result.stats.accepted - result.stats.forced for result in results)
    rejected = sum(result.stats.verified - result.stats.accepted for result in results)
    p = p_value([tuple(result.token_ids) for result in results], laws_of(params, params.grammar))
    return p, min(offered, rejected)


@pytest.mark.parametrize(
    ("rule", "shape", "drafter", "processors"), [cell for cell in CELLS if cell not in SLOW_ONLY]
)
def test_the_law_is_the_masked_targets(
    rule: str, shape: str, drafter: str, processors: str
) -> None:
    p, judged = sampled(rule, shape, drafter, processors, 120)
    assert p > ALPHA
    assert judged > 12 or drafter == "none"


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "shape", "drafter", "processors"), CELLS)
def test_many_texts_have_the_masked_targets_law(
    rule: str, shape: str, drafter: str, processors: str
) -> None:
    assert sampled(rule, shape, drafter, processors, 20_000)[0] > ALPHA


def unmasked_target(patch: pytest.MonkeyPatch) -> None:
    """The verifier draws from the whole law."""
    from dspark.verify import verifier

    shape = verifier.shape_logits
    patch.setattr(verifier, "shape_logits", lambda *args: shape(*args[:5]))


def unmasked_record(patch: pytest.MonkeyPatch) -> None:
    """The draft draws under the mask and records the law without it."""
    laws = grow.sampling.laws

    def recorded(shaped: torch.Tensor, *args) -> torch.Tensor:
        return laws(torch.where(shaped.isinf(), shaped.amax(), shaped), *args)

    patch.setattr(grow.sampling, "laws", recorded)


def drawn_nodes_dropped(patch: pytest.MonkeyPatch) -> None:
    """What was drawn without the mask and is ruled out goes, as if it had never been drawn."""
    inside = round_draft.without_forbidden

    def careless(proposal, allowed):
        kept = inside(replace(proposal, law_of=proposal.law_of[:0]), allowed).tree
        if kept.num_nodes == proposal.tree.num_nodes:
            return proposal
        keep = _places(proposal.tree, kept)
        return proposal.subtree(keep)

    patch.setattr(round_draft, "without_forbidden", careless)


def _places(tree, kept):
    """Which nodes of a tree a subtree has, bool [N]; equal siblings cannot be among drawn ones."""
    paths = {tuple(kept.path_tokens(node)) for node in range(kept.num_nodes)}
    return torch.tensor(
        [tuple(tree.path_tokens(n)) in paths for n in range(tree.num_nodes)]
    ).numpy()


FLAT = Automaton({"start": {2: "start", 4: "start", 5: "start", 9: "start", END: ""}})
"""A grammar that forces nothing, so that every token is drawn."""

FAULTS = [
    (unmasked_target, 100, "coupled", "tree", "model", "plain"),  # which no sample can miss
    (unmasked_target, 100, "rejection", "tree", "model", "plain"),
    pytest.param(unmasked_record, 400, "rejection", "tree", "model", "hot", marks=pytest.mark.slow),
    (unmasked_record, 400, "block", "chain", "model", "hot"),
    (drawn_nodes_dropped, 400, "rejection", "chain", "stubborn", "plain"),
]


@pytest.mark.parametrize(("plant", "count", "rule", "shape", "drafter", "processors"), FAULTS)
def test_a_fault_on_one_side_is_seen(
    plant,
    count: int,
    rule: str,
    shape: str,
    drafter: str,
    processors: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    own = {"max_tokens": 3, "grammar": FLAT}
    assert sampled(rule, shape, drafter, processors, count, **own)[0] < ALPHA


def test_without_a_fault_the_same_is_not_seen() -> None:
    own = {"max_tokens": 3, "grammar": FLAT}
    assert sampled("rejection", "chain", "stubborn", "plain", 400, **own)[0] > ALPHA


def test_a_draft_without_the_mask_is_slower_and_no_more() -> None:
    """Under the coupled rule the text stays; nodes that are ruled out leave before their row."""
    params = params_of("coupled", "tree", "plain", grammar=Automaton(), max_tokens=40)
    each = [replace(params, seed=seed) for seed in range(20)]
    prompts = [list(PROMPT)] * len(each)
    masked = engine_of(drafter_of("model")).generate(prompts, each)
    unaware = engine_of(drafter_of("unaware")).generate(prompts, each)
    assert [r.token_ids for r in masked] == [r.token_ids for r in unaware]
    rounds = [sum(r.stats.rounds for r in results) for results in (masked, unaware)]
    assert rounds[0] < rounds[1]
