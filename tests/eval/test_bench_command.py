"""`dspark bench` on a tiny model: output, files, exit codes, interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark.commands.bench import bench_command
from dspark.commands.bench_table import bench_tables
from dspark.commands.tables import print_wide
from dspark.errors import CheckpointError, ConfigError, DataError, DsparkError
from dspark.eval.bench_log import BenchLog
from tests.eval.commands import run_command
from tests.eval.fake_server import serving
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
    fixed = ["--target", model, "--prompts", prompts, "--dtype", "float32", "--max-tokens", "6"]

    def invoke(*arguments: str) -> int:
        return run_command(bench_command, *fixed, "--exact", *arguments)

    return invoke


CHAIN, TREE = "lookup width 1 budget 5", "lookup width 4 budget 5"
NAMES = ["none", CHAIN, TREE, "transformers", "transformers:lookup"]


@pytest.fixture(scope="module")
def sweep(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result file: chain against tree against transformers, at two concurrencies."""
    folder = tmp_path_factory.mktemp("sweep")
    asked, out = folder / "tiny.jsonl", folder / "speed.json"
    asked.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--draft", "lookup", "--width", "1", "--width", "4", "--tree-budget", "5"]
    options += ["--runner", "transformers", "--runner", "transformers:lookup"]
    options += ["--concurrency", "1", "--concurrency", "2", "--repeats", "2", "--quiet"]
    options += ["--target", model, "--prompts", str(asked), "--out", str(out), "--exact"]
    assert run_command(bench_command, *options, "--max-tokens", "6", "--dtype", "float32") == 0
    return out


def test_the_result_file_says_what_was_measured(sweep: Path) -> None:
    found = json.loads(sweep.read_text())
    assert (found["schema"], found["version"], found["baseline"]) == ("dspark.bench", 1, "none")
    assert [item["name"] for item in found["configurations"]] == NAMES
    plain, _, tree, stock, lookup = found["configurations"]
    assert tree["sampling"]["width"] == 4
    assert stock["library"]["name"] == "transformers"
    assert (stock["mode"], lookup["mode"], tree["draft"]) == ("plain", "lookup", "lookup")
    assert (plain["is_exact"], stock["is_exact"]) == (True, None)
    header = found["header"]
    assert (header["repeats"], header["concurrencies"], header["template"]) == (2, [1, 2], "chat")
    assert header["sampling"][0]["ignore_eos"] is True
    (skipped,) = found["skipped"]
    assert (skipped["configuration"], skipped["concurrency"]) == ("transformers:lookup", 2)


def test_runs_are_kept_in_the_order_in_which_they_ran(sweep: Path) -> None:
    runs = json.loads(sweep.read_text())["runs"]
    assert len(runs) == 2 * (5 + 4)
    first, later = (
        [item["configuration"] for item in runs if (item["concurrency"], item["repeat"]) == at]
        for at in ((1, 0), (1, 1))
    )
    assert first == NAMES
    assert later != NAMES
    assert sorted(later) == sorted(NAMES)
    for item in runs:
        assert [row["question_id"] for row in item["requests"]] == [1, 2]
        assert item["output_tokens"] == 12
        assert item["memory"]["peak_rss"] > 0
        assert item["seconds"] > 0
    assert len(sweep.with_suffix(".log.jsonl").read_text().splitlines()) == 18


def test_the_figures_are_of_all_configurations(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a tiny model's speeds have many digits
    found = json.loads(sweep.read_text())
    for cell in found["figures"]:
        assert (cell["repeats"], cell["ended_early"], cell["failed"]) == (2, 0, [])
        if cell["configuration"] in (CHAIN, TREE):
            assert cell["same_text"] == {"equal": 4, "of": 4}
            assert cell["speedup"]["over"] == "none"
            assert sum(cell["stage_share"].values()) == pytest.approx(1)
    print_wide(bench_tables(found))  # what a terminal gets
    shown = capsys.readouterr().out
    for word in ("over none", "K/V cache", "first p50", "same text", "4/4", CHAIN):
        assert word in shown


def test_json_is_the_result_and_the_only_output(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    options = ("--draft", "none", "--repeats", "1", "--warm-up", "0")
    assert run(*options, "--out", str(out), "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == json.loads(out.read_text())


def test_a_pipe_gets_tab_separated_tables_and_a_line_for_every_run(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--repeats", "1", "--warm-up", "0", "--no-ignore-eos", "--temperature", "0.5")
    assert run(*options) == 0
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()]
    heads = [row[0] for row in rows]
    for head in ("throughput", "latency, ms", "time", "memory, MiB", "tok/s (speed-up)"):
        assert head in heads
    assert heads.count("none") == heads.count("auto") == 5
    assert "auto: auto took lookup" in printed.err
    assert "2 prompts of tiny, up to 6 tokens each, temperature 0.5; 1 repeat" in printed.err
    assert "none, concurrency 1, repeat 1 of 1: " in printed.err
    assert " left" in printed.err


def test_another_baseline_takes_the_place_of_plain_decoding(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--draft", "lookup", "--runner", "transformers", "--baseline", "transformers")
    assert run(*options, "--repeats", "1", "--json") == 0
    printed = capsys.readouterr()
    assert "end tokens ignored: 6 tokens each, greedy" in printed.err
    found = json.loads(printed.out)
    assert [cell["configuration"] for cell in found["figures"]] == ["lookup", "transformers"]
    assert found["figures"][0]["speedup"]["over"] == "transformers"
    assert found["figures"][0]["same_text"] is None  # of another engine


def test_an_interrupted_run_exits_130_and_goes_on(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    original, seen = BenchLog.append, []

    def append(*arguments: object) -> None:
        original(*arguments)
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(BenchLog, "append", append)
    assert run("--repeats", "2", "--json") == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted; 2 finished runs are kept in" in printed.err
    assert "run the same command again" in printed.err
    (log,) = (cache / "dspark" / "bench").iterdir()
    assert run("--repeats", "2", "--json") == 0
    printed = capsys.readouterr()
    assert "2 of 4 runs were taken from" in printed.err
    assert json.loads(printed.out)["resumed"] == 2
    assert len(seen) == 4
    assert not log.exists()  # nothing asked for it to stay


def test_a_server_is_measured_with_the_same_prompts(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    with serving() as fake:
        options = ("--url", f"mine={fake.url}", "--api-key-env", "THE_KEY", "--draft", "none")
        assert run(*options, "--repeats", "2", "--warm-up", "0", "--json") == 0
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err
    assert set(fake.headers) == {"Bearer secret"}
    asked = [body["messages"][0]["content"] for body in fake.bodies]
    assert asked == ["abcabcabc", "xyxyxyxy"] * 2
    found = json.loads(printed.out)
    server = next(cell for cell in found["figures"] if cell["configuration"] == "mine")
    assert server["tau"] == pytest.approx(3)
    assert server["speedup"]["over"] == "none"
    assert server["memory"]["peak_rss"] is None
    assert found["configurations"][1]["url"] == fake.url
    assert "the-model" in found["configurations"][1]["note"]


def test_what_a_server_fails_in_is_named_and_the_exit_status_is_2(
    run: Run, prompts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [*ROWS, {"question_id": "bad", "category": "two", "turns": ["please refuse"]}]
    Path(prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "speed.json"
    with serving(metrics=None) as fake:
        options = ("--url", f"mine={fake.url}", "--url-timeout", "5", "--out", str(out))
        assert run(*options, "--repeats", "2", "--draft", "none") == 2
        assert "repeat 2, question bad: HTTP 500: no room." in capsys.readouterr().err
        found = json.loads(out.read_text())
        (cell,) = [item for item in found["figures"] if item["configuration"] == "mine"]
        assert [failure["question_id"] for failure in cell["failed"]] == ["bad", "bad"]
        assert cell["tokens_per_second"]["median"] > 0
        before = len(fake.bodies)
        assert run(*options, "--repeats", "2", "--draft", "none", "--quiet") == 2
        assert len(fake.bodies) > before  # the runs that failed are tried again
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--runner", "vllm"), ConfigError, "--runner is 'vllm', but must be transformers"),
        (("--runner", "llama.cpp"), ConfigError, "must be transformers.*llama.cpp=FILE.gguf"),
        (("--runner", "transformers=x"), ConfigError, "--runner is 'transformers=x'"),
        (("--runner", "llama.cpp=gone.gguf"), ConfigError, "gone.gguf cannot be read: No such"),
        (("--runner", "transformers:assisted=no/where/"), CheckpointError, "no/where/"),
        (("--baseline", "vllm"), ConfigError, "--baseline is 'vllm', but must be one of"),
        (("--url", "a=localhost:1"), ConfigError, "must be one of http or https"),
        (("--url", "a=http://127.0.0.1:9", "--api-key-env", "NO_KEY"), ConfigError, "NO_KEY, but"),
        (("--url-timeout", "0"), ConfigError, "--url-timeout is 0"),
        (("--width", "0"), ConfigError, "width is 0"),
        (("--tree-budget", "-1"), ConfigError, "tree_budget is -1"),
        (("--max-tokens", "0"), ConfigError, "max_tokens is 0"),
        (("--width", "1", "--width", "1"), ConfigError, "'auto width 1' was asked for twice"),
        (("--prompts", "gone.jsonl"), DataError, "gone.jsonl cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run, options: tuple[str, ...], error: type[DsparkError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(*options)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tiny.jsonl, line 1: there is no prompt"),
        ('{"turns": ["a"]}\n{"turns": [', "tiny.jsonl, line 2: not JSON"),
        ('{"turns": ["a"]}\n{"turns": []}', "tiny.jsonl, line 2: turns must be a list"),
    ],
)
def test_a_malformed_prompt_file_is_named_with_its_line(
    run: Run, prompts: str, text: str, message: str
) -> None:
    Path(prompts).write_text(text)
    with pytest.raises(DataError, match=message):
        run()
