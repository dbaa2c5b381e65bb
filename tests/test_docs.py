"""The documentation says what the code does: generated pages, tables, links."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from dspark.request import RequestStats, SamplingParams

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"```.*?```", re.DOTALL)


@pytest.fixture
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_cli.py", "--check"])
    module.main()


def test_the_command_line_page_is_up_to_date(
    make_cli: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(make_cli, monkeypatch)


def test_a_stale_command_line_page_is_caught(
    make_cli: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stale = tmp_path / "cli.md"
    stale.write_text(make_cli.build_page().replace("`--seed`", "`--sede`"), encoding="utf-8")
    monkeypatch.setattr(make_cli, "PAGE", stale)
    with pytest.raises(SystemExit) as caught:
        _check(make_cli, monkeypatch)
    assert caught.value.code == 3
    assert "--sede" in capsys.readouterr().err


def test_the_table_of_sampling_parameters_has_every_field_and_its_default() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = text.split("## SamplingParams", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.MULTILINE))
    assert rows == {field.name: repr(field.default) for field in fields(SamplingParams)}


def test_the_page_on_python_names_every_statistic() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = text.split("## Statistics", 1)[1].split("\n## ", 1)[0]
    missing = [f.name for f in fields(RequestStats) if f"`{f.name}`" not in section]
    assert not missing


def _anchors(text: str) -> set[str]:
    """Heading anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def _broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        file = page if not name else (page.parent / name)
        found = _anchors(file.read_text(encoding="utf-8")) if file.is_file() else None
        if found is None or (anchor and anchor not in found):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    assert not list(_broken_links(page))


def test_a_broken_link_is_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](gone.md)\n", encoding="utf-8")
    assert list(_broken_links(page)) == ["page.md#two", "gone.md"]
