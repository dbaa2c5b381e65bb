"""`dspark doctor` on a tiny model: output, files, exit codes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands import doctor as command
from dspark.errors import CheckpointError, DataError
from dspark.eval.doctor import run as doctor_run
from dspark.eval.doctor import speed_check
from dspark.eval.doctor.findings import CheckResult, DoctorReport, Finding, Severity
from tests.eval.commands import run_command
from tests.test_cli import TEMPLATE, save_model

Run = Callable[..., int]
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "chatty", template=TEMPLATE))


@pytest.fixture(scope="module", autouse=True)
def cache(module_cache: Path) -> Path:
    return module_cache


@pytest.fixture
def run(model: str, tmp_path: Path) -> Run:
    """Run the command; returns its exit status. Errors of ours are raised."""
    prompts = tmp_path / "tiny.jsonl"
    prompts.write_text(json.dumps({"question_id": 1, "turns": ["abcabcabc"]}) + "\n")

    def invoke(*arguments: str) -> int:
        fixed = ["--target", model, "--dtype", "float32", "--exact", "--quick", "--quiet"]
        more = ["--prompts", str(prompts), "--max-tokens", "12"]
        return run_command(command.doctor, *fixed, *more, *arguments)

    return invoke


COST = {
    "budgets": [
        {
            "budget": budget,
            "tau": 2.0,
            "mean_rows": budget + 1.0,
            "draft_seconds": 0.001,
            "round_seconds": 0.02,
            "plain_seconds": 0.01,
            "speedup": 1.0,
            "break_even": 2.0,
        }
        for budget in (3, 15)
    ],
    "best_budget": 3,
    "predicted": 1.0,
    "measured": {"speedup": 1.1, "drafted": 11.0, "plain": 10.0},
}


def report(*severities: Severity) -> DoctorReport:
    findings = tuple(
        Finding(
            severity=severity,
            what=f"a {severity.value} that is told in a sentence",
            evidence="figures, " * 20,
            advice="do this",
        )
        for severity in severities
    )
    checks = [
        CheckResult(name="one", findings=findings),
        CheckResult(name="two", seen="looks well"),
        CheckResult.skipped("three", "does not apply"),
        CheckResult.skipped("four", "does not apply"),
    ]
    return DoctorReport(header={}, checks=checks, cost=COST)


def test_lookup_on_a_tiny_model_is_looked_at(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a step costs is measured in two seconds otherwise.
    brief = functools.partial(speed_check.quick_profile, seconds=0.2)
    monkeypatch.setattr(speed_check, "quick_profile", brief)
    out = tmp_path / "doctor.json"
    status = run("--draft", "lookup", "--json", "--out", str(out))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert status == (3 if found["status"] == "problem" else 0)
    assert found["schema"] == "dspark.doctor"
    assert found["header"]["drafts"][0]["id"] == "lookup"
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["loading"]["status"] == "fine"
    assert by_name["layer ids"]["status"] == "not checked"
    assert {own["budget"] for own in found["cost"]["budgets"]} == {3, 15}
    assert found["cost"]["predicted"] > 0
    assert found["cost"]["measured"]["speedup"] > 0


@pytest.mark.parametrize(("severity", "status"), [(Severity.PROBLEM, 3), (Severity.WARNING, 0)])
def test_the_exit_status_is_3_if_a_problem_was_found(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    severity: Severity,
    status: int,
) -> None:
    monkeypatch.setattr(doctor_run, "diagnose", lambda *_, **__: report(severity))
    assert run("--draft", "lookup") == status
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [severity.value, "one", f"a {severity.value} that is told in a sentence"]
    assert lines[2] == ["", "do", "do this"]
    assert ["fine", "two", "looks well"] in lines
    assert ["not checked", "three, four", "does not apply"] in lines


def test_a_terminal_of_100_columns_is_not_overrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    command._print(report(*Severity))
    lines = _ESCAPES.sub("", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 100
    words = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert words[:3] == ["problem", "warning", "note"]
    assert "predicted with 3 nodes: 1.00x; measured: 1.10x" in " ".join(lines)
    assert words[-1] == "1"  # 1 problem, 1 warning, 1 note


def test_a_draft_that_cannot_be_found_is_a_finding(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--draft", str(tmp_path / "gone")) == 3
    assert "the draft cannot be loaded" in capsys.readouterr().out


def test_bad_input_is_an_error(run: Run) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run("--out", "gone/doctor.json")
    with pytest.raises(DataError, match="cannot be read"):
        run("--prompts", "gone.jsonl")
    with pytest.raises(CheckpointError, match="no file or folder"):
        run("--target", "./gone")
