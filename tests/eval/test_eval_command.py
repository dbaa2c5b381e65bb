"""`dspark eval` on a tiny model: output, files, exit codes, interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands.eval import eval_command
from dspark.commands.eval_table import eval_tables
from dspark.commands.tables import print_wide
from dspark.errors import ConfigError, DataError, DsparkError
from dspark.eval.log import RunLog
from tests.eval.commands import run_command
from tests.test_cli import TEMPLATE, save_model

ROWS = [
    {"question_id": 1, "category": "one", "turns": ["abcabcabc", "again"]},
    {"question_id": 2, "category": "two", "turns": ["xyxyxyxy"]},
]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "chatty", template=TEMPLATE))


@pytest.fixture(scope="module", autouse=True)
def cache(module_cache: Path) -> Path:
    return module_cache


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def run(model: str, prompts: str) -> Run:
    """Run the command; returns its exit status. Errors of ours are raised."""
    fixed = ["--target", model, "--prompts", prompts, "--dtype", "float32", "--max-tokens", "10"]

    def invoke(*arguments: str) -> int:
        return run_command(eval_command, *fixed, "--exact", *arguments)

    return invoke


def test_json_is_the_result_and_the_only_output(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, answers = tmp_path / "results.json", tmp_path / "answers"
    drafts = ("--draft", "none", "--draft", "lookup")
    files = ("--out", str(out), "--answers", str(answers), "--quiet")
    assert run(*drafts, *files, "--json", "--definition", "specbench") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert found == json.loads(out.read_text())
    print_wide(eval_tables(found))  # what a terminal gets instead
    shown = capsys.readouterr().out
    assert "accept_len" in shown
    assert f"{found['configurations'][1]['acceptance']['tau']:.2f}" in shown
    assert (found["schema"], found["version"]) == ("dspark.eval", 1)
    plain, lookup = found["configurations"]
    assert plain["acceptance"]["tau"] == 1
    assert lookup["acceptance"]["tau"] >= 1
    assert found["header"]["template"] == "chat"
    assert found["header"]["target"]["id"] == "chatty"
    one, two = sorted(answers.iterdir())
    texts = [
        [json.loads(line)["choices"][0]["turns"] for line in path.read_text().splitlines()]
        for path in (one, two)
    ]
    assert texts[0] == texts[1]  # what equal.py compares
    assert {"lookup", "none"} == {path.name.split("-")[1] for path in (one, two)}
    rows = [json.loads(line) for line in (tmp_path / "results.log.jsonl").read_text().splitlines()]
    assert len(rows) == 4


def test_a_pipe_gets_tab_separated_tables(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """And several widths make several configurations."""
    options = ("--draft", "lookup", "--width", "1", "--width", "2", "--temperature", "0.5")
    assert run(*options, "--first-turn", "--context-buckets", "12,1K", "--definition", "vllm") == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split("\t")[0] for line in lines]
    for head in ("configuration", "counts", "tau by category", "as vllm counts"):
        assert head in heads
    assert "lookup width 1 T=0.5 tiny" in heads
    assert "lookup width 2 T=0.5 tiny" in heads


def test_several_tree_budgets_are_several_configurations(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ("--tree-budget", "2", "--tree-budget", "5")
    assert run("--draft", "lookup", *budgets, "--first-turn", "--json", "--quiet") == 0
    cells = json.loads(capsys.readouterr().out)["configurations"]
    assert [cell["sampling"]["tree_budget"] for cell in cells] == [2, 5]
    assert [cell["name"] for cell in cells] == [
        "lookup budget 2 T=0 tiny",
        "lookup budget 5 T=0 tiny",
    ]


def test_several_rules_are_several_configurations_but_for_greedy(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    laws = ("--temperature", "0", "--temperature", "1", "--rule", "coupled", "--rule", "rejection")
    assert run("--draft", "lookup", *laws, "--first-turn", "--json", "--quiet") == 0
    cells = json.loads(capsys.readouterr().out)["configurations"]
    assert [cell["sampling"]["rule"] for cell in cells] == ["greedy", "coupled", "rejection"]
    assert [cell["name"] for cell in cells] == [
        "lookup T=0 tiny",
        "lookup T=1 coupled tiny",
        "lookup T=1 rejection tiny",
    ]


def test_an_interrupted_run_exits_130_and_says_how_to_go_on(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    options = ("--draft", "lookup", "--json")
    original, seen = RunLog.append, []

    def append(*arguments: object, **more: str) -> None:
        original(*arguments, **more)
        seen.append(arguments)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "append", append)
    assert run(*options) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted; 1 finished questions are kept in" in printed.err
    assert "run the same command again" in printed.err
    (log,) = (cache / "dspark" / "eval").iterdir()
    assert run(*options) == 0
    printed = capsys.readouterr()
    assert "1 of 2 questions were taken from" in printed.err
    assert json.loads(printed.out)["configurations"][0]["resumed"] == 1
    assert not log.exists()  # nothing asked for it to stay
    assert len(seen) == 2


def test_a_question_that_fails_is_reported_and_the_exit_status_is_2(
    run: Run, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"question_id": 3, "category": "two", "turns": ["a" * 5000]}]
    Path(prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--draft", "lookup", "--json") == 2
    printed = capsys.readouterr()
    assert "error: question 3: the prompt has" in printed.err
    (cell,) = json.loads(printed.out)["configurations"]
    assert [failure["question_id"] for failure in cell["failed"]] == [3]
    assert cell["acceptance"]["prompts"] == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--context-buckets", "4K,1K"), ConfigError, "rising"),
        (("--context-buckets", "x"), ConfigError, "--context-buckets is 'x'"),
        (("--definition", "nobody"), ConfigError, "definition is 'nobody'"),
        (("--rule", "greedy", "--temperature", "1"), ConfigError, "greedy needs 0"),
        (("--rule", "auto", "--rule", "luck"), ConfigError, "rule is 'luck'"),
        (("--prompts", "gone.jsonl"), DataError, "gone.jsonl cannot be read"),
        (("--temperature", "-1"), ConfigError, "temperature is -1"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run, options: tuple[str, ...], error: type[DsparkError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(*options)
    assert "\n" not in caught.value.message


def test_acceptance_does_not_depend_on_the_batch(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for batch in ("1", "2"):
        assert run("--draft", "lookup", "--json", "--batch", batch, "--temperature", "1") == 0
        figures.append(json.loads(capsys.readouterr().out)["configurations"][0])
    assert figures[0]["acceptance"] == figures[1]["acceptance"]
    assert figures[0]["confidence"] == figures[1]["confidence"]
