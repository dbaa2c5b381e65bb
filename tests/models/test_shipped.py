"""Drafts that come with the package: found by the source of the model they were trained for."""

import json

import pytest

from dspark.models.shipped import find_shipped, shipped_folders
from dspark.models.store import MARKER

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
