"""`dspark profile` on a tiny model: output, files, exit codes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands import profile as command
from dspark.errors import ConfigError, DataError, DsparkError
from dspark.eval.profile import Profile, read_profile
from tests.eval.commands import run_command
from tests.eval.test_profile import JAGGED, curve
from tests.test_cli import save_model

Run = Callable[..., int]
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
SMALL = ("--rows", "1,2,8", "--contexts", "16,64", "--repeats", "2", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module", autouse=True)
def cache(module_cache: Path) -> Path:
    return module_cache


@pytest.fixture
def run(model: str) -> Run:
    """Run the command; returns its exit status. Errors of ours are raised."""

    def invoke(*arguments: str) -> int:
        fixed = ["--target", model, "--dtype", "float32", "--no-exact"]
        return run_command(command.profile, *fixed, *arguments)

    return invoke


def test_what_is_measured_is_printed_written_kept_and_shown(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="has no profile yet"):
        run("--show")
    out, table, plot = (str(tmp_path / name) for name in ("p.json", "sps.json", "p.svg"))
    files = ("--out", out, "--sglang", table, "--sglang-context", "16", "--plot", plot)
    assert run(*SMALL, *files, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads(Path(out).read_text())
    assert (found["contexts"], found["rows"]) == ([16, 64], [1, 2, 8])
    assert found["header"]["target"]["id"] == "tiny"
    assert found["key"]["target"] == found["header"]["target"]["fingerprint"]
    assert found["settings"]["tokens"] == "text"
    assert json.loads(Path(table).read_text())["sample_batch_tokens"] == [1, 2, 8]
    assert Path(plot).stat().st_size > 1000
    assert run("--show") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["context", "rows", "requests"]
    assert [line[:3] for line in lines[1:4]] == [
        ["16", "1", "1"],
        ["16", "2", "1"],
        ["16", "8", "1"],
    ]
    assert len(lines) == 7


def test_a_table_of_sglang_is_read_without_a_target(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "sps.json", tmp_path / "p.json"
    fields = {"sample_batch_tokens": [1, 8], "sample_steps_per_sec": [50.0, 40.0]}
    path.write_text(json.dumps({**fields, "max_batch_tokens": 8}))
    assert run("--target", "nowhere", "--from-sglang", str(path), "--out", str(out)) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("0\t1\t1\t50.000\t0.02")
    assert read_profile(out).rows == (1, 8)


def test_an_interrupted_profile_exits_130_and_is_not_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    from dspark.eval import profile_measure

    def interrupted(*arguments: object, **options: object) -> Profile:
        return curve(JAGGED, is_interrupted=True)

    monkeypatch.setattr(profile_measure, "measure_profile", interrupted)
    before = sorted(cache.rglob("profiles/*.json"))
    assert run() == 130
    printed = capsys.readouterr()
    assert "interrupted" in printed.err
    assert len(printed.out.splitlines()) == 9
    assert sorted(cache.rglob("profiles/*.json")) == before


def test_a_quick_profile_is_printed_and_not_kept(
    run: Run, capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark.eval import profile_measure

    brief = functools.partial(profile_measure.quick_profile, seconds=0.2)
    monkeypatch.setattr(profile_measure, "quick_profile", brief)
    before = sorted(cache.rglob("profiles/*.json"))
    assert run("--quick", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) >= 2
    assert sorted(cache.rglob("profiles/*.json")) == before


def test_a_terminal_of_100_columns_has_room_for_three_contexts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    slow = {rows: 123.4 * value for rows, value in JAGGED[512].items()}
    command._print(curve({**JAGGED, 2048: slow}))
    lines = _ESCAPES.sub("", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = [line for line in lines if line.split()[:1] == ["16"]]
    assert "50/s" in row
    assert "2.00x" in row
    assert "0.203/s" in row


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--rows", "1,x"), ConfigError, "--rows is '1,x'"),
        (("--rows", "4,2"), ConfigError, "must be rising"),
        (("--contexts", "9M"), ConfigError, "does not fit"),
        (("--plot", "a.pdf"), ConfigError, r"must end in \.svg or \.png"),
        (("--out", "gone/p.json"), DataError, "no such folder"),
        (("--from-sglang", "gone.json"), DataError, "cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run, options: tuple[str, ...], error: type[DsparkError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(*options)
    assert "\n" not in caught.value.message
