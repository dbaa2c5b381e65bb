"""`dspark calibrate` on a tiny model with a random DSpark draft: files, output, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dspark
from dspark.commands.calibrate import calibrate_command
from dspark.draft.calibration_file import FILE_NAME
from dspark.draft.formats.native import save_module
from dspark.errors import CapabilityError, ConfigError, DataError, DsparkError
from dspark.eval.results import describe_model
from dspark.eval.runner import Runner
from tests.draft.dspark_models import make_module
from tests.eval.commands import run_command
from tests.test_cli import save_model

ROWS = [
    {"question_id": 1, "category": "one", "turns": ["abcabcabc"]},
    {"question_id": 2, "category": "one", "turns": ["xyxyxyxy"]},
]
ONE_CHAIN = ("--rule", "rejection", "--temperature", "1", "--shape", "chain")
Run = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft for it with a confidence head."""
    root = tmp_path_factory.mktemp("models")
    draft = save_module(root / "draft", make_module("llama"), storage="float32")
    return save_model(root / "target", layers=4), draft


@pytest.fixture(scope="module", autouse=True)
def _own_cache(module_cache: Path) -> None:
    """Nothing of the user's is read or written."""


@pytest.fixture
def run(models: tuple[Path, Path], tmp_path: Path) -> Iterator[Run]:
    """Run the command; returns its exit status. Errors of ours are raised."""
    target, draft = models
    prompts = tmp_path / "tiny.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fixed = ["--target", str(target), "--prompts", str(prompts), "--dtype", "float32", "--exact"]
    fixed += ["--max-tokens", "12"]

    def invoke(*arguments: str, draft: str = str(draft)) -> int:
        return run_command(calibrate_command, *fixed, "--draft", draft, *arguments)

    yield invoke
    (draft / FILE_NAME).unlink(missing_ok=True)


def load(models: tuple[Path, Path]) -> dspark.Engine:
    target, draft = models
    return dspark.Engine.load(target=target, draft=draft, dtype="float32", exact=True)


def test_maps_are_kept_beside_the_draft_and_used(
    run: Run,
    models: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, sts = tmp_path / "results.json", tmp_path / "sts.json"
    assert run(*ONE_CHAIN, "--json", "--out", str(out), "--to-sglang", str(sts)) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert results == json.loads(out.read_text())
    assert (results["schema"], results["version"]) == ("dspark.calibrate", 1)
    assert f"kept in {models[1] / FILE_NAME}" in printed.err.replace("\n", "")
    kept = json.loads((models[1] / FILE_NAME).read_text())
    assert kept["maps"] == results["maps"]
    (entry,) = kept["maps"]
    assert [row["position"] for row in entry["positions"]] == [1, 2, 3, 4, 5]
    assert set(entry["positions"][0]["ece"]) == {"unfitted", "confidence", "scaled", "fitted"}
    written = json.loads(sts.read_text())
    assert written["temperatures"] == entry["sts"]["temperatures"]
    assert len(written["temperatures"]) == len(written["ece_after"]) == 5
    first = describe_model(str(models[1]))
    (key,) = load(models).drafter.config.calibration.maps
    assert (key.rule.value, key.temperature, key.is_chain) == ("rejection", 1.0, True)
    (models[1] / FILE_NAME).unlink()
    assert describe_model(str(models[1])) == {k: first[k] for k in first if k != "calibration"}
    assert len(first["calibration"]) == 64


def test_a_pipe_gets_tab_separated_tables_and_a_dry_run_keeps_nothing(
    run: Run, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--temperature", "0", "--width", "2", "--dry-run", "--quiet") == 0
    printed = capsys.readouterr()
    lines = [line.split("\t") for line in printed.out.splitlines()]
    heads = [line[0] for line in lines if not line[0].startswith(("position", "child"))]
    assert heads == ["greedy T=0 chain", "greedy T=0 tree", "greedy T=0 tree, children"]
    assert all(len(line) in (9, 7) for line in lines)
    assert printed.err == ""
    assert not (models[1] / FILE_NAME).exists()


def test_sglangs_temperatures_are_taken_without_a_run(
    run: Run,
    models: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(Runner, "run", None)
    sts = tmp_path / "sts.json"
    sts.write_text(json.dumps({"temperatures": [1.0, 1.5, 2.0, 2.5, 3.0], "dataset": "theirs"}))
    assert run(*ONE_CHAIN, "--from-sglang", str(sts), "--quiet") == 0
    assert "position 2\t1.500" in capsys.readouterr().out
    (rating,) = load(models).drafter.config.calibration.maps.values()
    assert rating.temperature.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert (rating.confidence.tolist(), rating.share.tolist()) == ([1.0], [0.0])


def test_an_interrupted_run_keeps_the_maps_that_are_whole(
    run: Run,
    models: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    original, calls = Runner.run, []

    def stop_late(self: Runner, *arguments: object, **options: object) -> list:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Runner, "run", stop_late)
    out = tmp_path / "results.json"
    assert run("--temperature", "0", "--out", str(out)) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted: 1 of 2 maps had been fitted" in printed.err
    assert not out.exists()
    names = [
        (m["rule"], m["shape"]) for m in json.loads((models[1] / FILE_NAME).read_text())["maps"]
    ]
    assert names == [("greedy", "chain")]


def test_a_question_that_fails_is_reported_and_the_exit_status_is_2(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [*ROWS, {"question_id": 3, "category": "two", "turns": ["a" * 5000]}]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*ONE_CHAIN, "--json", "--dry-run") == 2
    printed = capsys.readouterr()
    assert "error: question 3: the prompt has" in printed.err
    assert [failure["question_id"] for failure in json.loads(printed.out)["failed"]] == [3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--shape", "bush"), ConfigError, "shape is 'bush'"),
        (("--rule", "greedy", "--temperature", "1"), ConfigError, "greedy needs 0"),
        (("--to-sglang", "sts.json"), ConfigError, "--to-sglang goes with one kind of chain"),
        (("--from-sglang", "sts.json"), ConfigError, "--from-sglang goes with one kind of chain"),
        (("--out", "gone/results.json"), DataError, "there is no such folder"),
        (("--prompts", "gone.jsonl"), DataError, "gone.jsonl cannot be read"),
        ((*ONE_CHAIN, "--depth", "2", "--to-sglang", "sts.json"), ConfigError, "depth is 2"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run,
    options: tuple[str, ...],
    error: type[DsparkError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        run(*options, "--quiet")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "sts.json").exists()


@pytest.mark.parametrize("draft", ["lookup", "none"])
def test_a_draft_that_has_no_weights_is_refused(run: Run, draft: str) -> None:
    with pytest.raises(CapabilityError, match="cannot be calibrated"):
        run(*ONE_CHAIN, draft=draft)
