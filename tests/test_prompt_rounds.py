"""Rounds in which prompts ride along: their time makes no token worth more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import dspark
from dspark.draft.base import DraftContext
from dspark.draft.model import ModelDrafter
from dspark.request import SamplingParams
from dspark.tree import DraftTree, Proposal
from tests.eval.toys import VOCAB, toy_pair


class OneNode(ModelDrafter):
    """Proposes one token, which it says is accepted with a chance of `survival`."""

    survival = 0.3

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        tree = replace(DraftTree.build([1], [-1]), survival=np.array([self.survival]))
        return [Proposal(tree) for _ in contexts]


@pytest.mark.parametrize(("survival", "expected"), [(0.3, 0), (0.9, 1)])
def test_a_node_that_does_not_pay_alone_does_not_pay_beside_a_prompt(
    survival: float, expected: int
) -> None:
    """A round takes 10 + 8 rows: a node pays from a chance of 8 / 18 on.

    Beside a prompt of a hundred tokens 8 is one percent of the round.
    """
    draft = OneNode(toy_pair()[1], vocab_size=VOCAB)
    draft.survival = survival
    config = dspark.EngineConfig(
        schedule="global",
        auto_off=False,
        step_seconds=lambda rows, context: 10.0 + 8.0 * rows,
        limits=dspark.RoundLimits(keep_rounds=True),
    )
    own = dspark.Engine(toy_pair()[0], drafter=draft, config=config)
    (first,) = own.submit([5, 6], SamplingParams(max_tokens=9, ignore_eos=True))
    own.step()  # its prompt
    own.step()
    (second,) = own.submit([7, 3] * 50, SamplingParams(max_tokens=2, ignore_eos=True))
    own.step()  # the second prompt beside it
    assert second.num_generated == 1
    assert [entry.verified for entry in first.result().stats.round_log] == [expected] * 2
