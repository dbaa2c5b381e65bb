"""The output's law under rules that draw from laws, with the scheduler in force.

Two tokens as in appendix A of the DSpark paper: the target's law is (.7, .3) and the draft's
(.5, .5) whatever came before, and how sure the draft is of a token depends on the one before it, so
what the scheduler cuts depends on drawn tokens. Each check has a twin that breaks a rule and must
fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import dspark
from dspark.draft.base import DraftContext
from dspark.draft.combined import CombinedDrafter
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import SamplingParams
from dspark.tree import DraftTree, Proposal
from dspark.verify import noise
from dspark.verify.scheduler import Offer, Scheduler
from dspark.verify.scheduler_setting import Schedule
from tests.eval.toys import VOCAB, ToyTarget, toy_pair
from tests.paged_toy import PagedTarget

TOKENS = 4  # the first of them comes from prefill
ALPHA = 1e-4
LAW = np.array([0.7, 0.3])


def two_tokens(law: Sequence[float]) -> torch.Tensor:
    """Logits of a law over tokens 0 and 1, [VOCAB]."""
    logits = torch.full((VOCAB,), -1e9)
    logits[:2] = torch.tensor(law).log()
    return logits


TARGET = ToyTarget(two_tokens(LAW.tolist()).expand(VOCAB * VOCAB, VOCAB))
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=1.0, rule="rejection", ignore_eos=True)


class Confident:
    """Draws from (.5, .5); sure of what follows token 0, not of what follows token 1.

    Survival follows from the parent's token and the draw index alone, as the contract wants.
    """

    name = "confident"
    capture = ()

    def __init__(self, width: int = 1) -> None:
        self._width = width

    def propose(self, contexts: list[DraftContext]) -> list[Proposal]:
        return [self._one(context) for context in contexts]

    def release(self, request_id: int) -> None:
        pass

    def _one(self, context: DraftContext) -> Proposal:
        tokens: list[int] = []
        parents: list[int] = []
        survival: list[float] = []
        row = two_tokens([0.5, 0.5])
        parent = -1
        for _ in range(min(context.depth, context.budget // self._width)):
            ids, _ = noise.draft_topk(
                row[None], [context.noise], [context.round], [parent], self._width
            )
            sure, above = 0.8, 1.0
            if parent >= 0:
                sure, above = (1.0, 0.05)[tokens[parent]], survival[parent]
            for rank, token in enumerate(ids[0].tolist()):
                tokens.append(token)
                parents.append(parent)
                survival.append(above * sure * (1.0, 0.2)[rank])
            parent = len(tokens) - self._width  # the first of them goes on
        laws = torch.softmax(row.double(), dim=0).expand(len(tokens), VOCAB)
        law_of = np.array(parents, dtype=np.int64) + 1
        return Proposal(DraftTree.build(tokens, parents, survival), laws, law_of)


def p_value(texts: list[list[int]]) -> float:
    """Pearson's test of all texts against the product law."""
    cells = list(itertools.product(range(2), repeat=TOKENS))
    seen = [sum(tuple(text) == cell for text in texts) for cell in cells]
    assert sum(seen) == len(texts)
    law = [len(texts) * float(np.prod(LAW[list(cell)])) for cell in cells]
    return float(stats.chisquare(seen, law).pvalue)


def line(base: int, node: float = 0.4) -> Callable[[int, int], float]:
    """Seconds of a step: a second per request, and so much per node."""
    return lambda rows, context: base + node * (rows - base)


def appendix_a(rows: int, context: int) -> float:
    return 1.0 / (1.0, 0.5, 0.45)[min(rows, 3) - 1]


def engine(
    drafter: object, schedule: str, seconds: Callable[[int, int], float], batch: int
) -> dspark.Engine:
    limits = dspark.RoundLimits(max_rows=1 << 12, tree_budget=4, depth=2)
    config = dspark.EngineConfig(
        schedule=schedule, step_seconds=seconds, max_batch=batch, limits=limits, auto_off=False
    )
    return dspark.Engine(TARGET, drafter=drafter, config=config)


def sampled(own: dspark.Engine, count: int, params: SamplingParams = PARAMS) -> list:
    """Results of one prompt under so many seeds."""
    each = [replace(params, seed=seed) for seed in range(count)]
    results = own.generate([[2, 1]] * count, each)
    assert all(result.error is None for result in results)
    return results


@pytest.mark.parametrize(
    ("schedule", "rule", "width", "node"),
    [
        ("auto", "rejection", 1, 0.4),
        ("auto", "rejection", 2, 0.05),  # where second children and second levels pay, too
        ("auto", "block", 1, 0.05),
        ("async", "rejection", 2, 0.4),
        # These two go by nothing that a round has drawn.
        pytest.param("threshold:0.3", "rejection", 2, 0.4, marks=pytest.mark.slow),
        pytest.param("fixed:1", "rejection", 1, 0.4, marks=pytest.mark.slow),
    ],
)
def test_the_law_stays_the_targets(schedule: str, rule: str, width: int, node: float) -> None:
    batch = 40
    own = engine(Confident(width), schedule, line(batch, node), batch)
    results = sampled(own, 300, replace(PARAMS, rule=rule))
    assert p_value([result.token_ids for result in results]) > ALPHA
    verified = sum(result.stats.verified for result in results)
    proposed = sum(result.stats.proposed for result in results)
    assert sum(result.stats.accepted for result in results) > 150
    if schedule not in ("fixed:1", "async"):  # which drafts no more, which begins with all
        assert 0.2 < verified / proposed < 0.9


def test_appendix_a_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in its batch a request meets the appendix's step rates: nothing pays at first sight."""
    results = sampled(engine(Confident(), "auto", appendix_a, 1), 60)
    assert p_value([result.token_ids for result in results]) > ALPHA
    assert sum(result.stats.verified for result in results) == 0

    # The same engine, made to search where the rule does not allow it.
    inside = Scheduler.plan

    def unaware(self: Scheduler, offers: list[Offer], load: object) -> list:
        return inside(self, [replace(offer, is_drawn=False) for offer in offers], load)

    monkeypatch.setattr(Schedule, "check", lambda self, rule: None)
    monkeypatch.setattr(Scheduler, "plan", unaware)
    results = sampled(engine(Confident(), "global", appendix_a, 1), 300)
    assert p_value([result.token_ids for result in results]) < ALPHA
    second = [result.token_ids[1] for result in results]
    assert abs(second.count(0) / 300 - 0.85) < 4 * np.sqrt(0.85 * 0.15 / 300)


@pytest.mark.parametrize("rule", ["rejection", pytest.param("block", marks=pytest.mark.slow)])
def test_the_law_stays_where_memory_runs_out(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has to give way hangs on how many tokens were accepted, but on none yet to be drawn."""
    monkeypatch.setattr("dspark.intake._HEADROOM_TOKENS", 0)
    batch = 20
    limits = dspark.RoundLimits(max_rows=1 << 12, tree_budget=4, depth=2)
    config = dspark.EngineConfig(
        step_seconds=line(batch), max_batch=batch, limits=limits, auto_off=False, memory_limit=44
    )
    drafter = Confident(2 if rule == "rejection" else 1)
    own = dspark.Engine(PagedTarget(TARGET.table), drafter=drafter, config=config)
    results = sampled(own, 360, replace(PARAMS, rule=rule))
    assert p_value([result.token_ids for result in results]) > ALPHA
    assert own.stats.preemptions > 20


@pytest.mark.slow  # many thousand samples
def test_requests_with_one_seed_keep_the_law_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the same noise, so what one drew is what the other is about to draw.

    The costs leave room for two nodes. If the first request's token is 0 its second node takes the
    room that the second request's first node has otherwise.
    """

    def second_texts() -> list[list[int]]:
        own = engine(
            Confident(),
            "auto",
            lambda rows, context: (1.0, 1.0, 1.0, 1.1, 1.2, 3.0, 4.0)[min(rows, 6)],
            2,
        )
        pairs = [own.generate([[2, 1]] * 2, replace(PARAMS, seed=seed)) for seed in range(400)]
        assert all(first.token_ids == other.token_ids for first, other in pairs) == is_kept_apart
        return [pair[1].token_ids for pair in pairs]

    is_kept_apart = True
    assert p_value(second_texts()) > ALPHA
    monkeypatch.setattr("dspark.verify.scheduler._sharing_noise", lambda offers: set())
    is_kept_apart = False
    assert p_value(second_texts()) < ALPHA


def test_rules_may_be_mixed_in_a_round() -> None:
    others = [
        SamplingParams(max_tokens=TOKENS, ignore_eos=True),
        replace(PARAMS, rule="coupled", seed=1),
        replace(PARAMS, rule="sample-match", seed=1),
    ]
    alone = [r.token_ids for r in dspark.Engine(TARGET).generate([[2, 1]] * 3, others)]
    own = engine(Confident(2), "auto", line(16), 16)
    texts = []
    for start in range(0, 260, 13):
        drawn = [replace(PARAMS, seed=seed) for seed in range(start, start + 13)]
        results = own.generate([[2, 1]] * 16, [*drawn, *others])
        texts += [result.token_ids for result in results[:13]]
        assert [result.token_ids for result in results[13:]] == alone
    assert p_value(texts) > ALPHA


@pytest.mark.parametrize("schedule", ["auto", "early-stop", "async"])
def test_with_a_profile_the_same_seed_gives_the_same_text_again(schedule: str) -> None:
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [2, 3, 4, 1] * 6]
    params = replace(PARAMS, max_tokens=16)
    each = [replace(params, seed=seed) for seed in range(3)]
    target, draft = toy_pair()
    drafter = CombinedDrafter(LookupDrafter(), ModelDrafter(draft, vocab_size=VOCAB))
    config = dspark.EngineConfig(schedule=schedule, step_seconds=line(3), auto_off=False)
    own = dspark.Engine(target, drafter=drafter, config=config)
    first = own.generate(prompts, each)
    assert 0 < sum(r.stats.verified for r in first) < sum(r.stats.proposed for r in first)
    # What the engine learned from the first turn must not show in the second.
    assert [r.token_ids for r in own.generate(prompts, each)] == [r.token_ids for r in first]
