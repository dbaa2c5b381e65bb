"""Drafts that come with the package: found by the source of the model they were trained for."""

import json

import pytest

from dspark.draft.calibration_file import fingerprint, read_calibration, read_maps
from dspark.models.aliases import ALIASES
from dspark.models.shipped import SHIPPED, find_shipped, shipped_folders
from dspark.models.store import MARKER
from dspark.request import Rule

SOURCE = {"alias": "one", "gguf_sha256": "ab" * 32}


def write(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    return folder


@pytest.fixture
def shipped(tmp_path):
    for name, source in (("one-dspark", SOURCE), ("other", {"alias": "other"})):
        fields = {"dspark_draft": {"target": {"source": source}}}
        write(tmp_path / "shipped" / name, "config.json", fields)
    return tmp_path / "shipped"


def test_a_model_of_the_same_source_has_the_draft(tmp_path, shipped):
    model = write(tmp_path / "model", MARKER, {"source": SOURCE})
    assert find_shipped(model, shipped=shipped) == shipped / "one-dspark"
    assert list(shipped_folders(shipped)) == ["one-dspark", "other"]


@pytest.mark.parametrize(
    "marker", [{"source": {**SOURCE, "gguf_sha256": "cd" * 32}}, {"source": {}}, {}, []]
)
def test_other_weights_have_none(tmp_path, shipped, marker):
    model = write(tmp_path / "model", MARKER, marker)
    assert find_shipped(model, shipped=shipped) is None


def test_a_folder_of_somebody_else_has_none(tmp_path, shipped):
    assert find_shipped(tmp_path, shipped=shipped) is None
    assert find_shipped(tmp_path, shipped=tmp_path / "nowhere") is None


# -- the one that comes with the default model -----------------------------------------------------

DEFAULT = SHIPPED / "dspark-smollm2-135m"


def test_the_default_model_s_draft_names_the_weights_it_was_trained_for(tmp_path):
    source = json.loads((DEFAULT / "config.json").read_text())["dspark_draft"]["target"]["source"]
    assert source["gguf_sha256"] == ALIASES["smollm2-135m"].gguf_sha256
    model = write(tmp_path / "model", MARKER, {"source": source})
    assert find_shipped(model) == DEFAULT


def test_the_default_model_s_draft_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) < 40e6
    card = (DEFAULT / "README.md").read_text()
    for heading in ("Model", "Data", "Training", "Figures", "Limits"):
        assert f"## {heading}" in card


def test_the_default_model_s_draft_is_calibrated_for_trees_of_every_rule():
    """A map for another fingerprint would be passed over, and drafting be rated by guess."""
    document = read_calibration(DEFAULT / "calibration.json")
    assert document["draft"]["fingerprint"] == fingerprint(DEFAULT, has_config=True)
    maps = read_maps(document)
    for rule, temperature in ((Rule.GREEDY, 0.0), (Rule.COUPLED, 1.0), (Rule.REJECTION, 1.0)):
        assert maps.find(rule, temperature, is_chain=False) is not None
