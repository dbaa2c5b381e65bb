"""`dspark simulate`: output, files, errors, and its place in a report."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands import simulate as command
from dspark.errors import DsparkError
from dspark.eval.log import RunLog
from dspark.eval.prompts import Question
from dspark.eval.report import build_page, render_html, render_markdown
from dspark.eval.results import write_results
from dspark.eval.simulate import parametric, setup
from dspark.eval.simulate.sweep import Sweep
from tests.eval.commands import run_command
from tests.eval.log_of import chain_round, record_of, turn_of
from tests.eval.test_profile import JAGGED, curve

Run = Callable[..., int]
SMALL = (
    *("--model", "v4-tiny-dspark", "--gpus", "1", "--step-ms", "1", "--prefill-chunk", "0"),
    *("--concurrency", "1,4", "--requests", "20", "--output-tokens", "20", "--seed", "3"),
)


_chain_pool = functools.cache(parametric.chain_pool)


@pytest.fixture
def same_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ask for the same acceptance share its rounds, which take time to draw."""
    monkeypatch.setattr(setup, "chain_pool", _chain_pool)


@pytest.fixture
def run() -> Run:
    """Run the command; returns its exit status. Errors of ours are raised."""
    return functools.partial(run_command, command.simulate)


def _log(path: Path) -> Path:
    """A log of two answers that drafted."""
    log = RunLog(path)
    for number, accepted in enumerate((2, 1)):
        rounds = [chain_round(accepted, 3, survival=(0.9, 0.6, 0.3)) for _ in range(6)]
        question = Question(question_id=number, category="a", turns=(str(number),))
        record = record_of(turn_of(*rounds, prompt=12), question_id=number)
        log.append("k", question, record, configuration="lookup T=0")
    log.close()
    return path


@pytest.mark.usefixtures("same_draft")
def test_points_comparisons_and_assumptions_are_printed_written_and_drawn(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "s.json", tmp_path / "s.svg"
    files = ("--out", str(out), "--plot", str(plot))
    assert run(*SMALL, *files, "--speed", "100", "--speed", "1e9") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split("\t")[:3] == ["load", "policy", "tokens_per_second"]
    assert [line.split("\t")[:2] for line in lines[1:5]] == [
        ["1", name] for name in ("plain", "mtp-1", "fixed:5", "dspark")
    ]
    assert "assumed: steps: roofline of v4-tiny-dspark on 1 x H200-141GB" in printed.err
    assert "20 requests a point" in printed.err
    results = json.loads(out.read_text())
    assert (results["schema"], results["version"]) == ("dspark.simulate", 1)
    assert len(results["points"]) == 8
    assert [item["policy"] for item in results["comparisons"]] == ["plain", "fixed:5", "dspark"]
    slow, fast = results["comparisons"][2]["at_speed"]
    assert slow["ratio"] > 1
    assert fast == {"speed": 1e9, "policy": None, "baseline": None, "ratio": None}
    assert plot.read_text().startswith("<?xml")


def test_the_same_seed_makes_the_same_points(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    less = ("--policy", "dspark", "--policy", "plain", "--baseline", "plain", "--acceptance", ".8")
    for seed in ("3", "3", "4"):
        assert run(*SMALL, *less, "--quiet", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_recorded_rounds_and_measured_steps_make_points(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, trace = tmp_path / "p.json", _log(tmp_path / "log.jsonl")
    write_results(profile, curve(JAGGED).to_json())
    used = ("--profile", str(profile), "--trace", str(trace), "--requests", "60", "--json")
    options = ("--policy", "chain:off", "--policy", "plain", "--concurrency", "2")
    assert run(*used, *options, "--prefill-chunk", "0", "--baseline", "plain") == 0
    results = json.loads(capsys.readouterr().out)
    drafted, plain = results["points"]
    # Half of the rounds commit 3 tokens, half 2, but the last of an answer may be cut.
    assert drafted["tau"] == pytest.approx(2.5, abs=0.25)
    # Two requests and no node: the profile's line between 1 and 4 rows, at context 128 or less.
    assert plain["seconds_per_round"] == pytest.approx(0.012)
    assert plain["tokens_per_second"] == pytest.approx(2 / 0.012)
    assert results["settings"]["prompt_tokens"] == "as recorded"


@pytest.mark.usefixtures("same_draft")
def test_arrivals_instead_of_a_closed_loop(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rate", "1,2", "--policy", "plain", "--max-batch", "8", "--baseline", "plain")
    small = [part for part in SMALL if part not in ("--concurrency", "1,4")]
    assert run(*small, *options, "--requests", "30", "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["rate"] for point in points] == [1.0, 2.0]
    assert points[1]["mean_under_way"] > points[0]["mean_under_way"] > 0


@pytest.mark.usefixtures("same_draft")
def test_what_is_done_after_ctrl_c_is_kept(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Sweep._point

    def interrupted(sweep: Sweep, *arguments: object) -> dict[str, object]:
        if len(sweep.points) == 3:
            raise KeyboardInterrupt
        return real(sweep, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Sweep, "_point", interrupted)
    assert run(*SMALL, "--out", str(tmp_path / "s.json")) == 130
    results = json.loads((tmp_path / "s.json").read_text())
    assert results["interrupted"] is True
    assert len(results["points"]) == 3
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "tree"), "needs acceptance of a tree draft"),
        (("--policy", "x"), "the policy 'x' is not known"),
        (("--concurrency", "1", "--rate", "1"), "exclude each other"),
        (("--concurrency", "1,x"), "--concurrency is '1,x'"),
        (("--concurrency", "0"), "the concurrency is 0"),
        (("--rate", "0"), "the arrival rate is 0"),
        (("--acceptance", "1.5"), "--acceptance is '1.5'"),
        (("--auroc", "0.3"), "--auroc is 0.3"),
        (("--mtp-acceptance", "2"), "--mtp-acceptance is 2"),
        (("--output-tokens", "trace"), "there is none that has them"),
        (("--kv-tokens", "100"), "does not fit into a cache of 100"),
        (("--draft-ms", "x"), "--draft-ms is 'x'"),
        (("--gpu", "abacus"), "no GPU 'abacus'"),
        (("--model", "v9"), "is no preset"),
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--profile", "nowhere.json"), "nowhere.json cannot be read"),
        (("--bench", "nowhere.json"), "nowhere.json cannot be read"),
        (("--plot", "x.gif"), "must end in .svg or .png"),
        (("--out", "nowhere/x.json"), "there is no such folder"),
    ],
)
@pytest.mark.usefixtures("same_draft")
def test_wrong_input_is_one_sentence(run: Run, options: tuple[str, ...], said: str) -> None:
    small = ("--model", "v4-tiny-dspark", "--requests", "20")
    loads = () if {"--rate", "--concurrency"} & set(options) else ("--concurrency", "1")
    with pytest.raises(DsparkError, match=said):
        run(*small, *loads, *options)


@pytest.mark.usefixtures("same_draft")
def test_a_report_shows_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    assert run(*SMALL, "--speed", "100", "--out", str(out), "--quiet") == 0
    page = build_page([out])
    (section,) = [s for s in page.sections if s.name == "Simulated serving"]
    assert [chart.title for chart in section.charts] == [
        "Simulated throughput against per-user speed",
        "Verification budget against load",
    ]
    assert any("roofline of v4-tiny-dspark" in line for line in section.text)
    assert [h.subject for h in page.headlines] == ["plain", "fixed:5", "dspark"]
    text = render_markdown(page)
    assert "Policies compared" in text
    assert "verification budget" in text
    assert "Simulated serving" in render_html(page)
