"""`dspark report`: where it writes, what it says, what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands.report import report
from dspark.errors import ConfigError, DataError
from tests.eval.commands import run_command
from tests.eval.report_samples import audit_results, profile_results, write

Run = Callable[..., None]


@pytest.fixture
def run() -> Run:
    """Run the command; errors of ours are raised."""

    def invoke(*arguments: str | Path) -> None:
        assert run_command(report, *map(str, arguments)) == 0

    return invoke


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return write(tmp_path, "audit", audit_results())


def test_the_page_goes_beside_the_first_file_and_stderr_says_so(
    run: Run, audit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = audit.parent / "report.html"
    for word in ("wrote", "replaced"):
        run(audit)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == f"{word} {page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in page.parent.iterdir()) == ["audit.json", "report.html"]


def test_both_forms_go_where_they_are_asked_for(
    run: Run, audit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, text = tmp_path / "a.html", tmp_path / "a.md"
    text.write_text("old")
    run(audit, "--out", page, "--markdown", text, "--title", "A & B")
    assert "<h1>A &amp; B</h1>" in page.read_text(encoding="utf-8")
    assert text.read_text(encoding="utf-8").startswith("# A &amp; B\n")
    assert capsys.readouterr().err == f"wrote {page}\nreplaced {text}\n"


def test_a_forced_report_warns_on_stderr(
    run: Run, audit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path, "other", audit_results(threads=64))
    with pytest.raises(ConfigError, match="threads"):
        run(audit, other)
    assert not (tmp_path / "report.html").exists()
    run(audit, other, "--force")
    assert "warning: audit.json and other.json do not compare" in capsys.readouterr().err
    assert "Not comparable." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_results_are_never_written_over(run: Run, audit: Path, tmp_path: Path) -> None:
    before = audit.read_bytes()
    for option in ("--out", "--markdown"):
        with pytest.raises(ConfigError, match="it is one of the results"):
            run(audit, option, tmp_path / "." / "audit.json")
    assert audit.read_bytes() == before
    with pytest.raises(ConfigError, match="are the same file"):
        run(audit, "--out", tmp_path / "x", "--markdown", tmp_path / "x")
    with pytest.raises(DataError, match="there is no such folder"):
        run(audit, "--out", tmp_path / "gone" / "x.html")
    with pytest.raises(DataError, match=r"cannot be written to .*: Is a directory"):
        run(audit, "--out", tmp_path)


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"a report needs {name}") as caught:
        run(write(tmp_path, "profile", profile_results()))
    assert caught.value.hint == "pip install 'dspark[report]'"
