"""Calibrating: what is observed, what is fitted from it, how it is judged and kept."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import transformers

import dspark
from dspark.draft.calibration import CalibrationKey, SurvivalMap
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.draft.recording import Children
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.eval.calibrate import Measured, calibrate, cells_of, folds, measure
from dspark.eval.calibrate_fit import (
    ece_floor,
    fit_logistic,
    fit_map,
    fit_temperatures,
    scaled_survival,
)
from dspark.eval.calibrate_record import Family, FirstPaths, Observations, OfferRecorder
from dspark.eval.confidence import calibration
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.records import all_rounds
from dspark.eval.runner import Runner, eval_engine
from dspark.request import Rule, SamplingParams
from dspark.text import TextCodec
from tests.eval.toys import VOCAB, toy_pair

LETTERS = "abcdefghijklm"
BASE = SamplingParams(max_tokens=40, depth=4, tree_budget=8)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@functools.cache
def toy_codec() -> TextCodec:
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(LETTERS)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.decoder = tokenizers.decoders.Fuse()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return TextCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names))


def toy_engine(*, batch: int = 8) -> dspark.Engine:
    target, draft = toy_pair()
    made = dspark.Engine(target, drafter=ModelDrafter(draft, vocab_size=VOCAB), codec=toy_codec())
    return eval_engine(made, batch=batch)


def prompt_set(count: int) -> PromptSet:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), 6)) for _ in range(count)]
    questions = (
        Question(question_id=i, category="xy"[i % 2], turns=(text,)) for i, text in enumerate(texts)
    )
    return PromptSet(name="toys", questions=tuple(questions))


def observed(params: SamplingParams, count: int = 5) -> tuple[Observations, list]:
    """What a recorder saw, and the log of rounds, which comes from the verifier."""
    engine, recorder = toy_engine(batch=1), OfferRecorder()
    drafter = engine.drafter
    drafter.config = replace(drafter.config, recorder=recorder, min_survival=0.0)
    records = Runner(engine, params, is_raw=True).run(prompt_set(count).questions)
    return recorder.observations(), all_rounds(records)


# -- what is observed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        "greedy",
        pytest.param("coupled", marks=pytest.mark.slow),
        pytest.param("sample-match", marks=pytest.mark.slow),
        "rejection",
        "block",
    ],
)
def test_outcomes_of_chains_are_the_verifiers(rule: str) -> None:
    temperature = 0.0 if rule == "greedy" else 1.0
    params = replace(BASE, rule=rule, temperature=temperature, width=1, tree_budget=4)
    seen, rounds = observed(params)
    drafted = [item for item in rounds if item.proposed]
    known = [np.flatnonzero(~np.isnan(row)) for row in seen.paths.accepted]
    if rule != "block":  # of which the last round of a text is left out
        assert len(drafted) == len(known)
        for item, row, places in zip(drafted, seen.paths.accepted, known, strict=True):
            assert row[places].sum() == min(item.matched, len(places))
            if item.committed == item.accepted + 1 and item.depth == 4:
                assert len(places) >= min(item.accepted + 1, 4)
    total = sum(item.accepted for item in drafted)
    found = np.nansum(seen.paths.accepted)
    assert 0.8 * total <= found <= total
    assert found > 20


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_outcomes_of_trees_are_the_verifiers(rule: str) -> None:
    """All that was accepted was a recorded child; of drawn trees nothing is pruned."""
    params = replace(BASE, rule=rule, temperature=1.0, width=3)
    seen, rounds = observed(params)
    hits = sum(family.hit >= 0 for family in seen.families)
    accepted = sum(item.accepted for item in rounds)
    assert hits > 40
    if rule == "rejection":
        assert accepted - 2 * 5 <= hits <= accepted
    else:
        assert hits >= accepted - 2 * 5
    for family in seen.families:
        assert family.hit < 0 or family.is_reached
        assert bool(family.children.share) == (rule == "coupled")


def test_what_a_text_does_not_tell_is_left_out() -> None:
    """The text ends inside the accepted path: nodes below are neither hits nor misses."""
    recorder = OfferRecorder()
    context = dspark.draft.base.DraftContext(
        request_id=1,
        tokens=[5, 6],
        prompt_length=1,
        params=SamplingParams(),
        rule=Rule.GREEDY,
        noise=dspark.verify.noise.NoiseKey(0),
        round=1,
        budget=4,
        depth=3,
    )

    def child(path: tuple[int, ...], *tokens: int) -> Children:
        count = len(tokens)
        return Children(
            path=path,
            tokens=tokens,
            share=(0.3,) * count,
            above=1.0,
            survival=(0.3,) * count,
            confidence=None,
        )

    recorder.note(context, [child((), 7, 8)])
    recorder.note(context, [child((7,), 9, 4), child((8,), 1)])
    recorder.note(context, [child((7, 9), 3)])
    context.tokens.extend([7, 9])  # the list is the request's own
    seen = recorder.observations()
    outcome = {f.children.path: (f.is_reached, f.hit) for f in seen.families}
    assert outcome == {(): (True, 0), (7,): (True, 0), (8,): (False, -1)}
    assert seen.paths.accepted.tolist() == [[1.0, 1.0]]


# -- what is fitted --------------------------------------------------------------------------------


def planted(count: int, rating: SurvivalMap, *, is_drawn: bool, seed: int = 0) -> Observations:
    """Rounds whose truth is a map: at every depth a node with some children, the first goes on."""
    rng = np.random.default_rng(seed)
    width, depth = len(rating.bias), len(rating.depth)
    families: list[Family] = []
    columns = {name: np.full((count, depth), np.nan) for name in ("share", "confidence")}
    accepted = np.zeros((count, depth))
    is_alive = np.ones(count, dtype=bool)
    for column in range(depth):
        share = -np.sort(-rng.dirichlet(np.full(width + 2, 0.5), size=count), axis=1)[:, :width]
        confidence = rng.normal(size=count) * 1.5
        given = {"share": None if is_drawn else share, "confidence": confidence.tolist()}
        edges = np.cumsum(rating.rates([column + 1] * count, width, **given), axis=1)
        hit = (edges < rng.uniform(size=count)[:, None]).sum(1)
        hit = np.where(is_alive & (hit < width), hit, -1)
        for row in range(count):
            children = Children(
                path=(0,) * column,
                tokens=tuple(range(width)),
                share=() if is_drawn else tuple(share[row].tolist()),
                above=0.6**column,
                survival=tuple((0.6 ** (column + 1) * share[row]).tolist()),
                confidence=float(confidence[row]),
            )
            is_reached = bool(is_alive[row])
            families.append(
                Family(
                    depth=column + 1, children=children, is_reached=is_reached, hit=int(hit[row])
                )
            )
        is_alive &= hit == 0
        accepted[:, column] = is_alive
        columns["confidence"][:, column] = confidence
        if not is_drawn:
            columns["share"][:, column] = share[:, 0]
    paths = FirstPaths(accepted=accepted, survival=np.full_like(accepted, 0.5), **columns)
    return Observations(families=tuple(families), paths=paths)


def truth(*, is_drawn: bool, width: int = 3, depth: int = 4) -> SurvivalMap:
    return SurvivalMap(
        bias=np.linspace(0.7, -1.0, width),
        share=np.zeros(width) if is_drawn else np.linspace(0.1, 0.6, width),
        lift=np.zeros(width) if is_drawn else np.linspace(3.0, 0.5, width),
        confidence=np.linspace(0.8, 0.1, width),
        depth=np.linspace(0.2, -0.4, depth),
        temperature=np.ones(depth),
    )


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_planted_map_is_found_again(is_drawn: bool) -> None:
    """Judged by what it says, not by its parameters: offsets and biases overlap."""
    real = truth(is_drawn=is_drawn)
    found = fit_map(planted(3000, real, is_drawn=is_drawn), is_drawn=is_drawn, is_chain=False)
    rng = np.random.default_rng(9)
    share = -np.sort(-rng.dirichlet(np.full(5, 0.5), size=60))[:, :3]
    given = {
        "share": None if is_drawn else share,
        "confidence": rng.normal(size=60).tolist(),
    }
    depth = [1 + i % 3 for i in range(60)]
    gap = found.rates(depth, 3, **given) - real.rates(depth, 3, **given)
    assert np.abs(gap).mean() < 0.015
    assert np.abs(gap).max() < 0.12
    assert bool(found.chances) == is_drawn


def test_a_target_less_certain_than_the_draft_is_found() -> None:
    """At temperature 1 a token that the draft is sure of is accepted at .7 at most."""
    real = truth(is_drawn=False, width=1, depth=1)
    real = replace(real, bias=np.array([-3.0]), share=np.zeros(1), lift=np.array([4.0]))
    found = fit_map(planted(6000, real, is_drawn=False), is_drawn=False, is_chain=True)
    share = np.array([[0.4], [0.6], [0.8], [0.95], [0.999], [1 - 1e-6]])
    given = {"share": share, "confidence": [0.0] * 6}
    gap = found.rates([1] * 6, 1, **given) - real.rates([1] * 6, 1, **given)
    assert np.abs(gap).max() < 0.04


@pytest.mark.parametrize("is_drawn", [False, True])
def test_little_evidence_changes_little(is_drawn: bool) -> None:
    """From three rounds the map stays near what the engine takes without one."""
    seen = planted(3, truth(is_drawn=is_drawn), is_drawn=is_drawn)
    found = fit_map(seen, is_drawn=is_drawn, is_chain=False)
    if is_drawn:
        assert found.confidence[0] == pytest.approx(1, abs=0.4)
        assert not found.share.any()
    else:
        np.testing.assert_allclose(found.share, 1, atol=0.5)


def test_a_slope_of_the_wrong_sign_is_held_at_zero() -> None:
    """Outcomes that get rarer where the draft is surer."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=2000)
    hit = (rng.uniform(size=2000) < sigmoid(0.5 - 2 * x)).astype(float)
    rows = np.stack([np.ones(2000), x], axis=1)
    center, spread = np.array([0.0, 1.0]), np.array([2.0, 0.5])
    free = fit_logistic(rows, hit, center, spread, np.array([False, False]))
    held = fit_logistic(rows, hit, center, spread, np.array([False, True]))
    assert free[1] < -1.5
    assert held[1] == 0
    assert held[0] == pytest.approx(np.log(hit.mean() / (1 - hit.mean())), abs=0.01)


def test_a_logistic_fit_is_the_minimum() -> None:
    """Against a coarse search of the same objective, written out."""
    rng = np.random.default_rng(4)
    rows, hit = rng.normal(size=(50, 1)), (rng.uniform(size=50) < 0.4).astype(float)
    found = fit_logistic(rows, hit, np.array([1.0]), np.array([0.5]), np.array([False]))
    grid = np.linspace(-2, 2, 4001)
    logits = rows * grid
    loss = (np.logaddexp(0, logits) - hit[:, None] * logits).sum(0) + 2 * (grid - 1) ** 2
    assert found[0] == pytest.approx(grid[loss.argmin()], abs=2e-3)


def test_planted_temperatures_are_found_again() -> None:
    """The head is too sure at depth 1, not sure enough at depth 2, right at depth 3."""
    rng = np.random.default_rng(0)
    real = np.array([2.5, 0.5, 1.0])
    logits = rng.normal(1.0, 2.0, size=(8_000, 3))
    alive = rng.uniform(size=logits.shape) < sigmoid(logits / real)
    accepted = np.cumprod(alive, axis=1).astype(float)
    found = fit_temperatures(logits, accepted)
    np.testing.assert_allclose(found, real, rtol=0.3)
    survival = scaled_survival(logits, found)
    for column in range(3):
        pairs = zip(survival[:, column].tolist(), (accepted[:, column] > 0).tolist(), strict=True)
        assert calibration(pairs)["ece"] < 1.5 * ece_floor(survival[:, column])


# Maps of both kinds are found again above, and a run under rejection is below.
@pytest.mark.parametrize("is_drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_held_out_positions_are_calibrated_to_two_percent(is_drawn: bool) -> None:
    """A head whose claim is wrong by a bias, which temperatures alone cannot mend."""
    real = truth(is_drawn=is_drawn, width=1, depth=2)
    real = replace(real, bias=np.array([-1.5]))
    seen = [planted(8_000, real, is_drawn=is_drawn, seed=seed) for seed in (1, 2)]
    rule = Rule.REJECTION if is_drawn else Rule.COUPLED
    key = CalibrationKey(rule=rule, temperature=1.0, is_chain=True)
    measured = Measured(folds=tuple(seen), failed=())
    entry = calibrate(key, measured, dataset="planted")
    assert [row["position"] for row in entry["positions"]] == [1, 2]
    for row in entry["positions"]:
        assert row["count"] == 16_000
        assert row["ece"]["fitted"] < 0.02
        assert row["floor"] < 0.02
    first = entry["positions"][0]["ece"]
    assert first["confidence"] > 0.05
    assert first["fitted"] < 0.3 * first["scaled"]
    assert entry["sts"]["num_samples"] == 16_000
    assert entry["rounds"] == {"count": 16_000, "folds": 2}
    json.dumps(entry, allow_nan=False)


def test_no_fold_is_judged_by_a_map_that_saw_it() -> None:
    """Folds that contradict each other: what is fitted on one is far off on the other."""
    real = truth(is_drawn=False, width=1, depth=1)
    low, high = (
        planted(4_000, replace(real, bias=np.array([bias])), is_drawn=False, seed=3)
        for bias in (-2.0, 2.0)
    )
    key = CalibrationKey(rule=Rule.COUPLED, temperature=1.0, is_chain=True)
    entry = calibrate(key, Measured(folds=(low, high), failed=()), dataset="planted")
    (row,) = entry["positions"]
    assert row["predicted"] == pytest.approx(row["observed"], abs=0.03)
    assert row["ece"]["fitted"] > 0.2
    both = fit_map(Observations.joined((low, high)), is_drawn=False, is_chain=True)
    assert entry["map"] == both.to_json()  # what is kept is fitted on all


def test_observations_of_different_depths_are_joined() -> None:
    shallow = planted(50, truth(is_drawn=False, width=1, depth=1), is_drawn=False, seed=1)
    deep = planted(60, truth(is_drawn=False, width=1, depth=3), is_drawn=False, seed=2)
    both = Observations.joined((shallow, deep))
    assert both.rounds == 110
    assert both.families == shallow.families + deep.families
    for name in ("share", "survival", "confidence", "accepted"):
        table = getattr(both.paths, name)
        np.testing.assert_array_equal(table[:50, :1], getattr(shallow.paths, name))
        assert np.isnan(table[:50, 1:]).all()
        np.testing.assert_array_equal(table[50:], getattr(deep.paths, name))


def test_the_floor_is_the_ece_of_a_perfect_estimate() -> None:
    rng = np.random.default_rng(6)
    predicted = rng.beta(2, 2, size=1500)
    errors = []
    for _ in range(60):
        outcome = rng.uniform(size=1500) < predicted
        errors.append(calibration(zip(predicted.tolist(), outcome.tolist(), strict=True))["ece"])
    assert np.mean(errors) == pytest.approx(ece_floor(predicted), rel=0.1)
    assert ece_floor(np.zeros(0)) is None


# -- running it ------------------------------------------------------------------------------------


def test_every_kind_of_request_is_one_cell() -> None:
    cells = cells_of(BASE, ["coupled", "rejection", "block"], [0.0, 1.0], ["chain", "tree"])
    names = [cell.key.name for cell in cells]
    assert names == [
        "greedy T=0 chain",
        "coupled T=1 chain",
        "rejection T=1 chain",
        "block T=1 chain",
        "greedy T=0 tree",
        "coupled T=1 tree",
        "rejection T=1 tree",
    ]
    assert all(cell.params.width == 1 for cell in cells if cell.key.is_chain)
    with pytest.raises(ConfigError, match="chains only"):
        cells_of(BASE, ["block"], [1.0], ["tree"])
    with pytest.raises(ConfigError, match="shape is 'bush'"):
        cells_of(BASE, ["block"], [1.0], ["bush"])
    with pytest.raises(ConfigError, match="width is 1"):
        cells_of(replace(BASE, width=1), ["coupled"], [1.0], ["tree"])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_folds_share_no_question_and_every_category(count: int) -> None:
    parts = folds(prompt_set(11), count)
    ids = [question.question_id for part in parts for question in part.questions]
    assert sorted(ids) == list(range(11))
    sizes = [len(part.questions) for part in parts]
    assert len(parts) == count
    assert max(sizes) - min(sizes) <= 1
    assert all({q.category for q in part.questions} == {"x", "y"} for part in parts)


def test_few_questions_are_a_fold_each() -> None:
    assert [len(part.questions) for part in folds(prompt_set(3), 4)] == [1, 1, 1]
    with pytest.raises(DataError, match="two or more"):
        folds(prompt_set(1))


@pytest.mark.parametrize("rule", [pytest.param("coupled", marks=pytest.mark.slow), "rejection"])
def test_a_run_improves_on_the_drafts_own_estimate(rule: str) -> None:
    """Trees of the toy pair, whose draft is off by design."""
    (cell,) = cells_of(replace(BASE, width=3, max_tokens=80), [rule], [1.0], ["tree"])
    engine, done = toy_engine(), []
    before = engine.drafter.config
    measured = measure(engine, cell, prompt_set(16), is_raw=True, batch=8, on_progress=done.append)
    assert engine.drafter.config is before
    assert done == sorted(done)
    assert done[-1] == 16
    assert not measured.failed
    entry = calibrate(cell.key, measured, dataset="toys")
    assert entry["sts"] is None  # it has no confidence head
    first = entry["positions"][0]
    assert first["ece"]["confidence"] is None
    assert first["ece"]["fitted"] < first["ece"]["unfitted"]
    assert first["ece"]["fitted"] < 2.5 * first["floor"]
    ranks = entry["ranks"]
    assert [row["rank"] for row in ranks] == [1, 2, 3]
    assert sum(row["observed"] for row in ranks) <= 1
    assert ranks[0]["ece"]["fitted"] < ranks[0]["ece"]["unfitted"]


def test_a_draft_without_laws_is_refused() -> None:
    engine = dspark.Engine(toy_pair()[0], drafter=LookupDrafter(), codec=toy_codec())
    (cell,) = cells_of(BASE, ["coupled"], [1.0], ["chain"])
    with pytest.raises(CapabilityError, match="lookup cannot be calibrated"):
        measure(engine, cell, prompt_set(2), is_raw=True)


def test_answers_too_short_to_tell_are_an_error() -> None:
    (cell,) = cells_of(replace(BASE, max_tokens=1), ["coupled"], [1.0], ["chain"])
    engine = toy_engine()
    before = engine.drafter.config
    with pytest.raises(DataError, match="too little was drafted"):
        measure(engine, cell, prompt_set(2), is_raw=True)
    assert engine.drafter.config is before
