"""Entry points are looked up once, but not once for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.installed import entry_points


def test_a_package_that_comes_onto_the_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "dspark.tests.installed"
    assert entry_points(group=group) == ()
    facts = tmp_path / "other-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{group}]\nthing = json:loads\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [entry.name for entry in entry_points(group=group)] == ["thing"]
