"""What a header tells of models, and files that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark.errors import DataError
from dspark.eval.results import code_fingerprint, describe_model, read_results, write_results

NOTHING = {"revision": None, "source": None, "fingerprint": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as far as the header looks: a config, a header without tensors."""
    model = tmp_path / "secret-path" / "my-model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    header = b"{}".ljust(8)
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return model


def test_a_model_is_told_by_name_and_contents_and_never_by_path(folder: Path) -> None:
    before = describe_model(str(folder))
    assert before["id"] == "my-model"
    assert "secret-path" not in json.dumps(before)
    assert describe_model(str(folder)) == before
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert describe_model(str(folder))["fingerprint"] != before["fingerprint"]


def test_a_hub_snapshot_tells_its_revision(tmp_path: Path, folder: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / revision
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    assert describe_model(str(snapshot))["revision"] == revision


def test_drafts_that_are_no_models_have_a_name(tmp_path: Path, folder: Path) -> None:
    assert describe_model("none") == {"id": "none", **NOTHING}
    assert describe_model("lookup") == {"id": "lookup", **NOTHING}
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one")
    first = describe_model(f"lookup:{corpus}")
    assert first["id"] == "lookup:corpus.txt"
    corpus.write_text("two")
    assert describe_model(f"lookup:{corpus}")["fingerprint"] != first["fingerprint"]
    both = describe_model(f"{folder}+lookup")
    assert both["id"] == "my-model+lookup"
    assert both["parts"] == [describe_model(str(folder)), describe_model("lookup")]


def test_a_result_file_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_results(tmp_path / "gone" / "r.json", {})
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "r.json", "x", 1)
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(DataError, match="has schema None"):
        read_results(tmp_path / "r.json", "x", 1)
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_results(tmp_path / "r.json", "x", 1)
    write_results(tmp_path / "r.json", {"schema": "x", "version": 1})
    assert read_results(tmp_path / "r.json", "x", 1) == {"schema": "x", "version": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert code_fingerprint() == code_fingerprint()
