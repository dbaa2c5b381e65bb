"""Hidden states of rounds without drafts, which wait for the next one that has some."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dspark.draft.dspark import DSparkDrafter
from tests.draft.dspark_models import make_module, paths_of


def test_observing_keeps_the_context_whole(given):
    module = make_module()
    drafter = DSparkDrafter(module)
    drafter.observe([given(10)])
    tree = drafter.propose([given(14, new=4)])[0].tree
    assert paths_of(tree) == paths_of(DSparkDrafter(module).propose([given(14)])[0].tree)


@pytest.mark.parametrize(
    "steps",
    [
        ((10, 9), (12, 2), (13, 1), (17, 4)),  # piece by piece
        ((10, 9), (90, 80), (95, 5)),  # more than may wait
        ((10, 9), (14, 4), (14, 13), (16, 2)),  # run again from the beginning
        ((10, 9), (14, 4), (16, 8)),  # run again in part
        ((10, 9), (14, 4), (14, 0), (16, 2)),  # a call that brings nothing
    ],
)
def test_what_waits_is_taken_in_with_the_next_draft(given, monkeypatch, steps):
    module, sizes = make_module(), []
    drafter = DSparkDrafter(module)
    take = drafter.runner.take

    def counted(parts):
        sizes.extend(len(rows) for _, _, rows in parts)
        take(parts)

    monkeypatch.setattr(drafter.runner, "take", counted)
    *before, (size, new) = steps
    for length, rows in before:
        drafter.observe([given(length, new=rows)])
    tree = drafter.propose([given(size, new=new)])[0].tree
    assert paths_of(tree) == paths_of(DSparkDrafter(module).propose([given(size)])[0].tree)
    assert len(sizes) <= 2
    drafter.observe([given(size + 1, new=1)])
    drafter.release(0)
    assert not drafter._contexts.num_waiting


@pytest.mark.parametrize("waits", ["the borrower", "the donor", "both", "nobody"])
def test_what_waits_is_neither_lost_to_a_shared_prefix_nor_as_a_donor(given, waits):
    """The second request has hidden states behind a prefix that it shares with the first."""
    module = make_module()
    drafter = DSparkDrafter(module)
    first, second = given(41), replace(given(46, new=5), request_id=1)
    if waits in ("the donor", "both"):
        drafter.observe([first])
    else:
        drafter.propose([first])
    if waits in ("the borrower", "both"):
        drafter.observe([second])
        drafter.release(0)
        second = replace(given(47, new=1), request_id=1)
    tree = drafter.propose([second])[0].tree
    alone = DSparkDrafter(module).propose([given(len(second.tokens))])[0].tree
    assert paths_of(tree) == paths_of(alone)
    np.testing.assert_allclose(tree.survival, alone.survival, rtol=1e-4)
