"""Confidence measures against plain definitions, and with planted faults."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.eval.confidence import auroc, brier, calibration, confidence
from tests.eval.log_of import chain_round

PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.95, 1.0]), st.booleans()))


@given(PAIRS)
def test_measures_equal_their_definitions(pairs: list[tuple[float, bool]]) -> None:
    found = calibration(pairs)
    assert found["count"] == len(pairs)
    if not pairs:
        assert found["ece"] is found["auroc"] is found["brier"] is None
        return
    assert found["brier"] == pytest.approx(np.mean([(p - y) ** 2 for p, y in pairs]))
    gaps = []
    for b in range(20):
        inside = [(p, y) for p, y in pairs if min(int(p * 20), 19) == b]
        if inside:
            gaps.append(abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(pairs))
    assert found["ece"] == pytest.approx(sum(gaps))
    hits, misses = [p for p, y in pairs if y], [p for p, y in pairs if not y]
    duels = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(hits, misses)]
    assert found["auroc"] == (pytest.approx(np.mean(duels)) if duels else None)
    assert sum(row["count"] for row in found["reliability"]) == len(pairs)


def test_honest_predictions_are_calibrated_and_boastful_ones_are_not() -> None:
    """ECE of 20 000 honest predictions stays under 0.02 (its mean is about 0.008)."""
    random = np.random.default_rng(1)
    truth = random.random(20_000)
    outcome = (random.random(20_000) < truth).astype(float)
    honest = calibration(zip(truth.tolist(), outcome.astype(bool).tolist(), strict=True))
    boastful = calibration(zip((truth**0.5).tolist(), outcome.astype(bool).tolist(), strict=True))
    assert honest["ece"] < 0.02 < 0.1 < boastful["ece"]
    assert honest["auroc"] == pytest.approx(boastful["auroc"])  # the same order
    assert honest["brier"] < boastful["brier"]
    shuffled = random.permutation(truth)
    assert auroc(shuffled, outcome) == pytest.approx(0.5, abs=0.02)
    assert brier(shuffled, outcome) > honest["brier"]


def test_prefix_and_step_by_hand() -> None:
    """Survival .8, .4 with one accepted; .5, .25 with none; .9 with one."""
    rounds = [
        chain_round(1, 2, survival=(0.8, 0.4)),
        chain_round(0, 2, survival=(0.5, 0.25)),
        chain_round(1, 1, survival=(0.9,)),
        chain_round(0, 0),
    ]
    found = confidence(rounds)
    assert found is not None
    first, second = found["per_position"]
    assert first["prefix"]["count"] == 3
    assert first["prefix"]["predicted"] == pytest.approx((0.8 + 0.5 + 0.9) / 3)
    assert first["prefix"]["observed"] == pytest.approx(2 / 3)
    assert first["step"] == first["prefix"]
    assert second["prefix"]["count"] == 2
    assert second["prefix"]["brier"] == pytest.approx((0.4**2 + 0.25**2) / 2)
    assert second["step"]["count"] == 1  # only where its parent was accepted
    assert second["step"]["predicted"] == pytest.approx(0.5)
    assert found["prefix"]["count"] == 5
    assert found["step"]["count"] == 4
    assert confidence([chain_round(0, 0)]) is None
