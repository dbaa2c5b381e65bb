"""Survival maps: what they give, which one is taken, and that no text depends on them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dspark
from dspark.draft.calibration import Calibration, CalibrationKey, SurvivalMap
from dspark.draft.calibration_file import (
    FILE_NAME,
    SCHEMA,
    VERSION,
    calibration_beside,
    fingerprint,
    read_maps,
)
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.grow import GrowthConfig
from dspark.errors import DataError
from dspark.request import Rule, SamplingParams
from tests.draft.dspark_models import VOCAB, make_features, make_module
from tests.draft.law_check import ALPHA, PROMPT, laws_of, p_values, params_of, smallest_p
from tests.draft.law_models import drafter_of, logits_of, target_of
from tests.draft.test_laws import PROMPTS, mixed_params, plain_texts
from tests.draft.test_laws import VOCAB as FEW
from tests.test_cli import save_model
from tests.verify.test_scheduler_laws import Told


def survival_map(ranks: int = 1, depths: int = 1, **values: object) -> SurvivalMap:
    """The draft's own estimate, but for what is given."""
    rows = {
        "bias": np.zeros(ranks),
        "share": np.ones(ranks),
        "confidence": np.zeros(ranks),
        "depth": np.zeros(depths),
        "temperature": np.ones(depths),
    }
    given = {k: v if k == "chances" else np.array(v, dtype=float) for k, v in values.items()}
    return SurvivalMap(**{**rows, **given})


def wild(seed: int, *, is_drawn: bool) -> SurvivalMap:
    """Anything that a file might hold."""
    rng = np.random.default_rng(seed)
    return SurvivalMap(
        bias=rng.normal(size=3) * 3,
        share=np.zeros(3) if is_drawn else np.abs(rng.normal(size=3)) * 3,
        lift=np.zeros(3) if is_drawn else np.abs(rng.normal(size=3)) * 3,
        confidence=np.abs(rng.normal(size=3)) * 4,
        depth=rng.normal(size=2) * 3,
        temperature=np.exp(rng.normal(size=2)),
        chances=tuple(rng.uniform(0.05, 0.9, 3).tolist()) if is_drawn else (),
    )


def wild_calibration(seed: int = 0) -> Calibration:
    """A wild map for every rule, chains and trees."""
    keys = [
        CalibrationKey(rule=rule, temperature=1.0, is_chain=is_chain)
        for rule, is_chain in itertools.product(Rule, (True, False))
    ]
    rows = enumerate(keys, start=10 * seed)
    return Calibration({key: wild(i, is_drawn=key.rule.draws_from_laws) for i, key in rows})


def calibrated(kind: str, vocab: int | None = None, seed: int = 0) -> dspark.draft.base.Drafter:
    drafter = drafter_of(kind) if vocab is None else drafter_of(kind, vocab)
    drafter.config = replace(drafter.config, calibration=wild_calibration(seed))
    return drafter


# -- the map ---------------------------------------------------------------------------------------


def test_without_a_fit_the_map_is_the_drafts_own_law() -> None:
    share = np.array([[0.5, 0.3, 0.1], [0.9, 0.05, 0.01]])
    rates = survival_map(3, 2).rates([1, 7], 3, share=share)
    np.testing.assert_allclose(rates, share, rtol=1e-9)


@pytest.mark.parametrize("is_drawn", [False, True])
def test_siblings_share_at_most_one_and_never_rise(is_drawn: bool) -> None:
    rng = np.random.default_rng(1)
    for seed in range(40):
        share = -np.sort(-rng.dirichlet(np.ones(6), size=9), axis=1)[:, :5]
        confidence = (rng.normal(size=9) * 40).tolist()
        given = {"share": None if is_drawn else share, "confidence": confidence}
        rates = wild(seed, is_drawn=is_drawn).rates([1, 2, 3] * 3, 5, **given)
        assert rates.shape == (9, 5)
        assert (rates >= 0).all()
        assert (rates.sum(1) <= 1 + 1e-12).all()
        assert (np.diff(rates, axis=1) <= 0).all()


def test_a_child_is_rated_the_same_however_many_come_after_it() -> None:
    rating, share = wild(3, is_drawn=False), np.array([[0.4, 0.3, 0.2, 0.05]])
    whole = rating.rates([2], 4, share=share, confidence=[0.7])
    for width in (1, 2, 3):
        part = rating.rates([2], width, share=share[:, :width], confidence=[0.7])
        np.testing.assert_allclose(part, whole[:, :width])


def test_order_is_kept() -> None:
    """A surer draft never makes a first child worth less."""
    for seed in range(20):
        rating = wild(seed, is_drawn=False)
        for confidence, share in ((np.linspace(-5, 5, 30), [0.4] * 30), ([1.0] * 30, None)):
            own = np.linspace(0.01, 0.99, 30) if share is None else np.array(share)
            rates = rating.rates([1] * 30, 1, share=own[:, None], confidence=list(confidence))
            assert (np.diff(rates[:, 0]) >= 0).all()


def test_a_lift_bends_the_curve_where_the_draft_is_certain() -> None:
    """By its share of what the children before it left: .5, then .6 of the other half."""
    rating = survival_map(2, 1, bias=[-2.0, -1.0], share=[0.0, 0.5], lift=[3.0, 2.0])
    first, second = rating.rates([1], 2, share=np.array([[0.5, 0.3]]))[0]
    chance = 1 / (1 + np.exp(-np.array([-2 + 3 * 0.5, -1 + 0.5 * np.log(0.6 / 0.4) + 2 * 0.6])))
    np.testing.assert_allclose([first, second], [chance[0], min(first, (1 - first) * chance[1])])
    certain = rating.rates([1], 1, share=np.array([[1 - 1e-9]]))[0, 0]
    assert certain == pytest.approx(1 / (1 + np.exp(-1.0)), abs=1e-6)


def test_a_map_from_before_there_was_a_lift_is_read_as_without_one() -> None:
    row = wild(1, is_drawn=True).to_json()
    del row["lift"]
    assert not SurvivalMap.from_json(row).lift.any()


def test_temperatures_alone_scale_the_confidence() -> None:
    rating = survival_map(1, 2, share=[0.0], confidence=[1.0], temperature=[2.0, 0.5])
    rates = rating.rates([1, 2, 3], 1, confidence=[1.0, -0.4, 3.0])[:, 0]
    np.testing.assert_allclose(rates, 1 / (1 + np.exp(-np.array([0.5, -0.8, 6.0]))))


def test_a_confidence_that_is_no_number_is_left_out() -> None:
    rating = survival_map(1, 1, share=[0.0], confidence=[1.0])
    np.testing.assert_allclose(rating.rates([1], 1, confidence=[float("nan")]), 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": [0.0, 0.0]}, "differ in length"),
        ({"temperature": [0.0]}, "above 0"),
        ({"bias": [np.nan]}, "bias of a survival map is not finite"),
        ({"share": [-0.1]}, "falls where the draft is surer"),
        ({"confidence": [-0.1]}, "falls where the draft is surer"),
        ({"chances": (1.0,)}, "between 0 and 1"),
    ],
)
def test_a_map_out_of_range_is_refused(values: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        survival_map(**values)


def test_which_map_a_request_gets() -> None:
    made = [
        (Rule.COUPLED, 1.0, True),
        (Rule.COUPLED, 0.5, True),
        (Rule.COUPLED, 1.0, False),
        (Rule.GREEDY, 0.0, False),
    ]
    keys = [CalibrationKey(rule=r, temperature=t, is_chain=c) for r, t, c in made]
    found = Calibration({key: survival_map(bias=[i]) for i, key in enumerate(keys)})

    def which(rule: Rule, temperature: float, is_chain: bool) -> float | None:
        rating = found.find(rule, temperature, is_chain=is_chain)
        return None if rating is None else float(rating.bias[0])

    assert which(Rule.COUPLED, 0.9, True) == 0
    assert which(Rule.COUPLED, 0.6, True) == 1
    assert which(Rule.COUPLED, 0.75, True) == 1  # as near: the lower one
    assert which(Rule.COUPLED, 0.1, False) == 2
    assert which(Rule.GREEDY, 0.0, True) == 3  # a tree's, where there is no chain's
    assert which(Rule.REJECTION, 1.0, True) is None
    only_chain = Calibration({keys[0]: survival_map()})
    assert only_chain.find(Rule.COUPLED, 1.0, is_chain=False) is None


# -- the file --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft model."""
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "target"), save_model(root / "draft")


@pytest.fixture
def write(folders: tuple[Path, Path]) -> Callable[..., Path]:
    """Write a calibration beside the draft; it is gone after the test."""
    target, draft = folders
    path = draft / FILE_NAME

    def make(**changes: object) -> Path:
        entry = {"rule": "greedy", "temperature": 0.0, "shape": "tree"}
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "draft": {"fingerprint": fingerprint(draft)},
            "target": {"name": "target", "fingerprint": fingerprint(target, has_config=False)},
            "maps": [{**entry, "map": wild(1, is_drawn=False).to_json()}],
        }
        path.write_text(json.dumps({**document, **changes}))
        return path

    yield make
    path.unlink(missing_ok=True)


def test_a_map_is_read_back_and_used_by_the_engine(
    folders: tuple[Path, Path], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = folders
    params = SamplingParams(max_tokens=12, tree_budget=6, width=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(target.parent / "cache"))
    options = {"target": target, "draft": draft, "dtype": "float32", "exact": True}
    plain = dspark.Engine.load(**options)
    assert plain.drafter.config.calibration is None
    write()
    loaded = dspark.Engine.load(**options)
    (rating,) = loaded.drafter.config.calibration.maps.values()
    for name in ("bias", "share", "confidence", "depth", "temperature"):
        np.testing.assert_allclose(getattr(rating, name), getattr(wild(1, is_drawn=False), name))
    texts = [engine.generate(["abcabc"], params)[0].text for engine in (plain, loaded)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": {"fingerprint": "0" * 64}}, "was made for another draft"),
        ({"target": {"fingerprint": "0" * 64}}, "was made for another target"),
        ({"draft": 3}, "was made for another draft"),
        ({"version": 2}, "is version 2"),
        ({"schema": "other"}, "is no file of dspark.calibration"),
        ({"maps": [3]}, "must be a list of objects"),
        ({"maps": [{"rule": "best"}]}, "has rule 'best'"),
    ],
)
def test_a_file_that_does_not_fit_is_passed_over_with_a_warning(
    folders: tuple[Path, Path],
    write: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    changes: dict,
    message: str,
) -> None:
    write(**changes)
    with caplog.at_level(logging.WARNING):
        assert calibration_beside(folders[1], folders[0]) is None
    assert message in caplog.text
    assert "dspark calibrate makes it anew" in caplog.text


def test_a_file_cut_short_is_passed_over(
    folders: tuple[Path, Path], write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write()
    path.write_text(path.read_text()[:-30])
    assert calibration_beside(folders[1], folders[0]) is None
    assert "is not JSON" in caplog.text


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    """Wherever in the file they differ by more than the samples leave out."""
    data = np.random.default_rng(0).bytes(3 << 20)
    path = tmp_path / "draft.safetensors"
    path.write_bytes(data)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    for at in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        for place in range(max(0, at - (1 << 18)), min(len(data), at + (1 << 18))):
            changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_map_of_drawn_nodes_may_not_read_what_is_drawn(rule: str) -> None:
    entry = {"rule": rule, "temperature": 1.0, "shape": "chain"}
    document = {"maps": [{**entry, "map": wild(1, is_drawn=False).to_json()}]}
    with pytest.raises(DataError, match="must not depend on the token that is drawn"):
        read_maps(document)


# -- what it changes, and what it does not -----------------------------------------------------


def given(make_context, rule: Rule, seed: int = 0, **options: object):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 9).tolist()
    values = {"rule": rule, "budget": 9, "depth": 3, "width": 3, **options}
    return make_context(
        tokens,
        features=make_features(8),
        request_id=seed,
        noise=dspark.verify.noise.NoiseKey(seed),
        **values,
    )


def test_survival_of_ranked_nodes_is_the_maps(make_context) -> None:
    """By a second way: shares from a drafter without a map, confidence from the module."""
    module, rating = make_module(), wild(5, is_drawn=False)
    key = CalibrationKey(rule=Rule.GREEDY, temperature=0.0, is_chain=False)
    plain = DSparkDrafter(module)
    plain.config = replace(plain.config, min_survival=0.0, beams=50)
    mapped = DSparkDrafter(module)
    mapped.config = replace(plain.config, calibration=Calibration({key: rating}))
    hidden = []
    module.confidence = lambda rows, tokens, own=module.confidence: (
        hidden.append(own(rows, tokens)) or hidden[-1]
    )
    options = {"budget": 3, "depth": 1}
    before = plain.propose([given(make_context, Rule.GREEDY, **options)])[0].tree
    assert not hidden  # nobody asks a head whose answer is not used
    after = mapped.propose([given(make_context, Rule.GREEDY, **options)])[0].tree
    assert before.token.tolist() == after.token.tolist()
    logits = [float(hidden[0][0])]
    share = before.survival[None]
    expected = rating.rates([1], 3, share=share, confidence=logits)[0]
    np.testing.assert_allclose(after.survival, expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_survival_of_drawn_nodes_is_known_before_the_draw(make_context, rule: Rule) -> None:
    drafter = DSparkDrafter(make_module())
    drafter.config = replace(drafter.config, calibration=wild_calibration(2))
    proposals = drafter.propose([given(make_context, rule, seed) for seed in range(60)])
    told = Told.of(proposals)
    assert not told.is_anticipating
    assert max(len(tokens) for tokens in told.tokens.values()) > 3
    deep = [v for known, values in told.seen.items() if len(known) > 1 for v in values]
    assert len(set(deep)) > 20  # what a node is worth does follow from the tokens above


def test_the_shape_of_drawn_trees_follows_from_the_mean_chances(make_context) -> None:
    """Hardly anything but the first draw is accepted: a chain; or each draw as well: wide."""

    def shape(chances: tuple[float, ...]) -> tuple[int, ...]:
        rating = survival_map(1, 1, share=[0.0], chances=chances)
        key = CalibrationKey(rule=Rule.REJECTION, temperature=1.0, is_chain=False)
        drafter = DSparkDrafter(make_module())
        drafter.config = replace(drafter.config, calibration=Calibration({key: rating}))
        return tuple(drafter.propose([given(make_context, Rule.REJECTION)])[0].tree.depth.tolist())

    steep, flat = shape((0.9, 0.05, 0.05)), shape((0.3, 0.3, 0.3))
    assert steep.count(1) < flat.count(1) or steep.count(3) > flat.count(3)


@pytest.mark.parametrize(("kind", "shape"), [("vanilla", "chain"), ("eagle3, few", "tree")])
def test_no_map_changes_a_text_of_rules_that_compare_tokens(kind: str, shape: str) -> None:
    engine = dspark.Engine(
        target_of("llama", FEW, exact=True),
        drafter=calibrated(kind, FEW),
        config=dspark.EngineConfig(max_batch=4, auto_off=False),
    )
    results = engine.generate(PROMPTS, mixed_params(shape))
    assert [result.token_ids for result in results] == plain_texts("llama")
    assert sum(result.stats.accepted for result in results) > 3


def test_no_map_changes_the_law_of_a_text() -> None:
    params = params_of("rejection, tree", "plain")
    target, drafter = target_of("llama"), calibrated("rnn")
    assert smallest_p(target, drafter, logits_of("llama"), params, 128) > ALPHA


@pytest.mark.parametrize("rule", ["rejection, tree", pytest.param("block", marks=pytest.mark.slow)])
def test_the_law_stays_when_the_scheduler_cuts_by_a_map(rule: str) -> None:
    """Survival follows from drawn tokens through the confidence head, and rows cost time."""
    batch = 64
    drafter = drafter_of("vanilla")
    rating = survival_map(share=[0.0], confidence=[2.0])
    keys = [CalibrationKey(rule=r, temperature=1.0, is_chain=r is Rule.BLOCK) for r in Rule]
    calibration = Calibration(dict.fromkeys(keys, rating))
    drafter.config = replace(drafter.config, calibration=calibration)
    config = dspark.EngineConfig(
        max_batch=batch,
        auto_off=False,
        step_seconds=lambda rows, context: batch + 0.5 * (rows - batch),
        limits=dspark.RoundLimits(max_rows=1 << 12, tree_budget=6, depth=3),
    )
    engine = dspark.Engine(target_of("llama"), drafter=drafter, config=config)
    params = replace(params_of(rule, "plain"), tree_budget=None, depth=None)
    texts, verified, proposed = [], 0, 0
    for start in range(0, 192, batch):
        each = [replace(params, seed=seed) for seed in range(start, start + batch)]
        for result in engine.generate([list(PROMPT)] * batch, each):
            texts.append(tuple(result.token_ids))
            verified += result.stats.verified
            proposed += result.stats.proposed
    assert min(p_values(texts, laws_of(logits_of("llama"), params)).values()) > ALPHA
    assert 0.05 < verified / proposed < 0.95


def test_settings_of_growth_hand_the_map_on(make_context) -> None:
    config = GrowthConfig(calibration=wild_calibration())
    for rule, width, is_chain in ((Rule.COUPLED, 1, True), (Rule.COUPLED, 2, False)):
        limits = config.limits(make_context([1, 2], rule=rule, width=width), 4)
        key = CalibrationKey(rule=rule, temperature=1.0, is_chain=is_chain)
        assert limits.rating is config.calibration.maps[key]
    block = config.limits(make_context([1, 2], rule=Rule.BLOCK), 4)
    key = CalibrationKey(rule=Rule.BLOCK, temperature=1.0, is_chain=True)
    assert (block.width, block.rating) == (1, config.calibration.maps[key])
