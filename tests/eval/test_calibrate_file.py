"""Where survival maps are kept, and SGLang's form of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dspark.draft.calibration import SurvivalMap
from dspark.errors import DataError
from dspark.eval.calibrate import keep_maps
from dspark.eval.calibrate_sglang import map_of, read_sglang, write_sglang


def entry_of(rule: str, temperature: float, bias: float) -> dict:
    rating = SurvivalMap(
        bias=np.array([bias]),
        share=np.zeros(1),
        confidence=np.array([0.8]),
        depth=np.linspace(0.2, -0.4, 4),
        temperature=np.ones(4),
    )
    return {
        "rule": rule,
        "temperature": temperature,
        "shape": "chain",
        "map": rating.to_json(),
        "sts": None,
    }


def test_maps_are_kept_side_by_side_until_the_weights_change(tmp_path: Path) -> None:
    draft, target = tmp_path / "draft", tmp_path / "target"
    for folder in (draft, target):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def keep(*entries: dict) -> dict[tuple, float]:
        path = keep_maps(draft, target, entries, target_name="t")
        rows = json.loads(path.read_text())["maps"]
        return {(row["rule"], row["temperature"]): row["map"]["bias"][0] for row in rows}

    assert keep(entry_of("rejection", 1.0, 1)) == {("rejection", 1.0): 1}
    both = keep(entry_of("coupled", 1.0, 2), entry_of("rejection", 0.5, 3))
    assert both == {("coupled", 1.0): 2, ("rejection", 0.5): 3, ("rejection", 1.0): 1}
    assert keep(entry_of("rejection", 1.0, 4))["rejection", 1.0] == 4
    (draft / "model.safetensors").write_bytes(b"another")
    assert keep(entry_of("greedy", 0.0, 5)) == {("greedy", 0.0): 5}
    (draft / "calibration.json").write_text("{")
    assert keep(entry_of("greedy", 0.0, 6)) == {("greedy", 0.0): 6}
    assert sorted(path.name for path in draft.iterdir()) == [
        "calibration.json",
        "model.safetensors",
    ]


def test_sglangs_form_is_written_and_read(tmp_path: Path) -> None:
    sts = {
        "temperatures": [1.5, 0.8],
        "dataset": "dspark",
        "num_samples": 7,
        "ece_before": [0.1, 0.2],
        "ece_after": [0.01, 0.02],
    }
    path = tmp_path / "sts.json"
    write_sglang(path, {**sts, "more": 1})
    assert json.loads(path.read_text()) == sts
    assert read_sglang(path, depth=2) == sts
    path.write_text('{"temperatures": [2, 1]}')  # all that SGLang asks for
    found = read_sglang(path, depth=2)
    rates = map_of(found["temperatures"]).rates([1, 2], 1, confidence=[3.0, 3.0])[:, 0]
    np.testing.assert_allclose(rates, 1 / (1 + np.exp([-1.5, -3.0])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no temperatures"),
        ('{"temperatures": [1, 1, 1]}', "predicts 2 tokens"),
        ('{"temperatures": [1, 0]}', "must be numbers > 0"),
        ('{"temperatures": [1, "2"]}', "must be a list of numbers"),
        ('{"temperatures": [1, 1], "bias": []}', "has the field bias"),
        ('{"temperatures": [1, 1], "num_samples": -1}', "num_samples is -1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sts.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_sglang(path, depth=2)
