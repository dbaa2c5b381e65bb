"""transformers' own generation tests on accelerated models; transformers_runner.py runs them.

They are in no package: set DSPARK_TRANSFORMERS_TESTS to a checkout of transformers of the installed
version and run with -m slow; it needs the package `parameterized`. DSPARK_TRANSFORMERS_TABLE names
a file for the table of docs/transformers.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("transformers_runner.py")
FAMILIES = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma 3", "tools": "calls"}
CHECKOUT = os.environ.get("DSPARK_TRANSFORMERS_TESTS", "")
TABLE = "DSPARK_TRANSFORMERS_TABLE"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (Path(CHECKOUT) / "tests" / "generation" / "test_utils.py").is_file(),
        reason="DSPARK_TRANSFORMERS_TESTS names no checkout of transformers",
    ),
    pytest.mark.skipif(find_spec("parameterized") is None, reason="parameterized is missing"),
]


@pytest.fixture(scope="module")
def collected():
    """Rows by family; written as a table when all families ran."""
    rows = {}
    yield rows
    if TABLE in os.environ:
        Path(os.environ[TABLE]).write_text(table(rows), encoding="utf-8")


def outcome(row):
    if row["with_dspark"] is not None:
        return "fails"
    if not row["fell_back"]:
        return "accelerated"
    return "both" if row["accelerated"] else "falls back"


def table(rows):
    """Markdown: a line for every outcome and reason, with the tests that had it."""
    found = {}
    for family, judged in rows.items():
        for row in judged:
            name = row["test"].partition(".")[2].removeprefix("test_")
            reasons = {reason.rstrip(".").partition(":")[0] for reason in row["reasons"]}
            key = (outcome(row), "; ".join(sorted(reasons)))
            found.setdefault(key, {}).setdefault(name, []).append(FAMILIES[family])
    models = [name for family, name in FAMILIES.items() if family in rows and family != "tools"]
    lines = ["| | for | tests |", "|---|---|---|"]
    for (result, reasons), names in sorted(found.items()):
        shown = ", ".join(
            f"`{name}`" if where in (models, [FAMILIES["tools"]]) else f"`{name}` ({where})"
            for name, where in sorted(names.items())
        )
        lines.append(f"| {result} | {reasons} | {shown} |")
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_as_it_is_passes_accelerated(family, collected):
    out = subprocess.run(
        [sys.executable, RUNNER, CHECKOUT, family],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    passing = [row for row in rows if row["stock"] is None]
    judged = [
        row for row in passing if row["with_dspark"] or row["accelerated"] or row["fell_back"]
    ]
    collected[family] = judged
    failed = {row["test"]: row["with_dspark"] for row in judged if row["with_dspark"] is not None}
    assert failed == {}
    assert sum(row["accelerated"] for row in judged) >= 6
    if family != "tools":  # some of which catch warnings themselves
        assert all(row["reasons"] for row in judged if row["fell_back"])
