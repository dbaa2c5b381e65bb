"""The trained V4 of the package: listed, whole, lossless with its own drafts, which it accepts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dspark.engine import Engine
from dspark.errors import CheckpointError
from dspark.models import find_cached, list_models, remove_model, resolve_model
from dspark.models.shipped import SHIPPED
from dspark.request import SamplingParams

DRAFTS = {"v4-mini": "dspark", "v4-mini-mtp": "mtp"}
# Of idlelib/config_key.py, which was held out.
SNIPPET = '''\
    def keys_ok(self, keys):
        """Validity check on user's 'basic' keybinding selection.

        Doesn't check the string produced by the advanced dialog because
        'modifiers' isn't set.
        """
        final_key = self.list_keys_final.get('anchor')
        modifiers = self.get_modifiers()
        title = self.keyerror_title
'''


def no_download(requirement: str, folder: Path, report: object) -> None:
    raise AssertionError(f"{requirement} was to be fetched")


@pytest.mark.parametrize("name", DRAFTS)
def test_the_alias_is_the_folder_of_the_package(name, tmp_path):
    folder = resolve_model(name, cache=tmp_path, download=no_download)
    assert folder == find_cached(name, cache=tmp_path) == SHIPPED / name
    listed = {entry.alias.name: entry for entry in list_models(cache=tmp_path)}
    assert listed[name].is_cached
    assert listed[name].disk_bytes < 20e6
    with pytest.raises(CheckpointError, match="is part of the package"):
        remove_model(folder)
    assert list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", DRAFTS)
def test_the_card_knows_its_files(name):
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\S+) \| \d+ \| ([0-9a-f]{64}) \|$", card, re.MULTILINE))
    assert set(rows) == {path.name for path in (SHIPPED / name).iterdir()} - {"README.md"}
    for file, digest in rows.items():
        assert hashlib.sha256((SHIPPED / name / file).read_bytes()).hexdigest() == digest
    assert "Python Software Foundation License" in card


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        pytest.param("v4-mini", False, marks=pytest.mark.real),
        # The probe behind exact mode takes longer than all the rest.
        pytest.param("v4-mini", True, marks=pytest.mark.slow),
        pytest.param("v4-mini-mtp", True, marks=pytest.mark.slow),
    ],
)
def test_held_out_code_is_continued_as_without_a_draft_and_drafts_are_accepted(name, exact):
    engine = Engine.load(target=name, draft="auto", exact=exact)
    assert engine.drafter is not None
    assert engine.drafter.name == DRAFTS[name]
    greedy = SamplingParams(max_tokens=16, ignore_eos=True)
    [expected] = engine.generate([SNIPPET], replace(greedy, draft=False))
    assert expected.stats.accepted == 0
    for shape in ({"width": 1, "tree_budget": 4}, {"tree_budget": 12}):
        [result] = engine.generate([SNIPPET], replace(greedy, **shape))
        assert result.token_ids == expected.token_ids
        assert result.stats.accepted_length > 1.5
