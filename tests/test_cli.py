"""The command line on a tiny model: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import dspark
from dspark import cli, loading
from dspark.commands import chat as chat_command
from dspark.models import store
from dspark.registry import LoadedTarget, LoadOptions, load_target
from tests.conftest import random_model
from tests.test_engine import make_codec

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def save_model(
    folder: Path, *, template: str | None = None, positions: int = 2048, layers: int = 1
) -> Path:
    """The tiny llama without an end token, and a tokenizer of one token per character."""
    model = random_model("llama", layers=layers)
    model.config.max_position_embeddings = positions
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = make_codec().tokenizer
    tokenizer.eos_token = None
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(0, 0))  # the same weights are checked once
    return folder


@pytest.fixture(scope="module")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "raw"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "chatty"
    return str(save_model(folder, template=TEMPLATE, positions=256))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(module_cache: Path) -> None:
    """Nothing of the user's is read or written."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def invoke(*arguments: str, stdin: str | bytes = b"") -> Ran:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "argv", ["dspark", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exc:
            code = int(exc.code or 0)
        return Ran(code, *capsys.readouterr())

    return invoke


@functools.cache
def _load_once(folder: Path, options: LoadOptions) -> LoadedTarget:
    return load_target(folder, options)


@pytest.fixture
def kept_models(monkeypatch: pytest.MonkeyPatch, raw_model: str, chat_model: str) -> None:
    """These two, which no test writes to, are loaded once for each set of options."""

    def load(folder: Path, options: LoadOptions) -> LoadedTarget:
        is_kept = str(folder) in (raw_model, chat_model)
        return (_load_once if is_kept else load_target)(folder, options)

    monkeypatch.setattr(loading, "load_target", load)


@pytest.fixture
def generate(run: Run, raw_model: str, kept_models: None) -> Run:
    """`dspark generate` in exact mode on the raw model, 12 tokens."""
    return functools.partial(
        run, "generate", "--target", raw_model, "--exact", "--dtype", "float32", "--max-tokens=12"
    )


@pytest.fixture(scope="module")
def library(raw_model: str) -> dspark.Engine:
    return dspark.Engine.load(raw_model, "none", dtype="float32", exact=True)


# -- generate ---------------------------------------------------------------------------------


def test_stdout_is_the_text_and_nothing_else(generate: Run, library: dspark.Engine) -> None:
    (expected,) = library.generate(["abcabc"], dspark.SamplingParams(max_tokens=12))
    ran = generate("abcabc")
    assert ran == Ran(0, expected.text + "\n", "")
    assert generate("abcabc", "--tree-budget", "0").out == ran.out
    assert generate("abcabc", "--show-accepted").out == ran.out  # no tint in a pipe


@pytest.mark.parametrize("draft", ["lookup", "itself+lookup"])
def test_the_draft_does_not_show_in_the_text(draft: str, generate: Run, raw_model: str) -> None:
    options = ("--temperature", "1", "--seed", "7")
    spec = draft.replace("itself", raw_model)
    assert generate("abcabc", *options, "--draft", spec).out == generate("abcabc", *options).out


def test_a_seed_gives_the_same_text_again_and_no_seed_another(generate: Run) -> None:
    seeded = ("abc", "--temperature", "1.5", "--seed", "3")
    assert generate(*seeded).out == generate(*seeded).out
    unseeded = ("abc", "--temperature", "1.5")
    assert generate(*unseeded).out != generate(*unseeded).out


def test_json_is_one_object_per_sample_with_the_documented_fields(
    generate: Run, library: dspark.Engine
) -> None:
    options = ("--n", "2", "--temperature", "1", "--seed", "5", "--logprobs", "2")
    ran = generate("abc", "--json", *options, "--draft", "lookup")
    assert (ran.code, ran.err) == (0, "")
    records = [json.loads(line) for line in ran.out.splitlines()]
    params = dspark.SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=2, logprobs=2)
    expected = library.generate(["abc"], params)
    assert len(records) == 2
    for record, result in zip(records, expected, strict=True):
        assert record["text"] == result.text
        assert record["token_ids"] == result.token_ids
        assert record["finish_reason"] == "length"
        assert record["sample_index"] == result.sample_index
        assert record["seed"] == 5
        assert [entry["token_id"] for entry in record["logprobs"]] == result.token_ids
        assert [len(entry["top"]) for entry in record["logprobs"]] == [2] * 12
        stats = record["stats"]
        assert {"rounds", "proposed", "verified", "accepted", "accepted_length"} <= set(stats)
        assert stats["committed"] == 11
        assert stats["accepted_length"] == pytest.approx(11 / stats["rounds"])
    (alone,) = [json.loads(line) for line in generate("abc", "--json").out.splitlines()]
    assert "logprobs" not in alone
    assert "error" not in alone


def test_samples_are_told_apart_on_stderr_only(generate: Run) -> None:
    ran = generate("abc", "--n", "2", "--temperature", "1", "--seed", "5")
    assert len(ran.out.splitlines()) == 2
    assert ran.err.splitlines() == ["prompt 0, sample 0", "prompt 0, sample 1"]


def test_prompts_come_from_files_and_standard_input(generate: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("abcabc")
    two.write_text("xyz é")
    texts = [generate("abcabc").out, generate("xyz é").out]
    ran = generate("--file", str(one), "--file", str(two))
    assert ran.code == 0
    assert ran.out == "".join(texts)
    assert generate("-", stdin="abcabc").out == texts[0]
    assert generate("--file", "-", stdin="xyz é").out == texts[1]


def test_a_prompt_that_fails_does_not_stop_the_others(generate: Run, tmp_path: Path) -> None:
    good, empty = tmp_path / "good.txt", tmp_path / "empty.txt"
    good.write_text("abcabc")
    empty.write_text("")
    ran = generate("--file", str(empty), "--file", str(good))
    assert ran.code == 2
    assert ran.out == generate("abcabc").out
    assert "error: the prompt is empty." in ran.err
    ran = generate("--file", str(empty), "--file", str(good), "--json")
    assert ran.code == 2
    failed, fine = [json.loads(line) for line in ran.out.splitlines()]
    assert failed["finish_reason"] == "error"
    assert "empty" in failed["error"]
    assert "error" not in fine


def test_statistics_go_to_stderr(generate: Run) -> None:
    plain = generate("abcabc")
    ran = generate("abcabc", "--stats", "--draft", "lookup")
    assert ran.out == plain.out
    for word in ("rounds", "accepted", "tau", "seconds:", "exact mode on as asked", "draft lookup"):
        assert word in ran.err
    assert all(len(line) < 200 for line in ran.err.splitlines())


def test_compare_says_whether_plain_decoding_gives_the_same(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--temperature", "1", "--seed", "3", "--draft", "lookup")
    ran = generate("abcabc", *options, "--compare")
    assert ran.code == 0
    assert ran.out == generate("abcabc", *options).out
    assert "plain decoding gives the same text" in ran.err
    many = generate("abc", *options, "--n", "2", "--compare")
    assert many.code == 0
    assert "same text in 2 of 2 samples" in many.err
    original = dspark.Engine.generate

    def broken(*arguments: object) -> list[dspark.GenerationResult]:
        results = original(*arguments)
        results[0].token_ids[-1] ^= 1
        return results

    monkeypatch.setattr(dspark.Engine, "generate", broken)
    ran = generate("abcabc", *options, "--compare")
    assert ran.code == 3
    assert "another text" in ran.err


def test_side_by_side_shows_both_answers_and_their_speeds(generate: Run) -> None:
    options = ("--temperature", "1", "--seed", "3", "--draft", "lookup", "--no-auto-off")
    plain = generate("abcabc", *options)
    ran = generate("abcabc", *options, "--side-by-side")
    assert ran.code == 0
    assert "plain decoding" in ran.out
    assert "draft lookup" in ran.out
    assert ran.out.count("tok/s") == 2
    assert ran.out.count(plain.out.split()[0][:8]) == 2
    assert "plain decoding gives the same text" in ran.err
    several = generate("abcabc", "--n", "2", "--side-by-side")
    assert several.code == 2
    assert "one prompt's answer" in several.err


def test_a_stop_string_ends_the_text(generate: Run) -> None:
    full = generate("abcabc").out.rstrip("\n")
    stop = full[5:8]
    ran = generate("abcabc", "--stop", stop, "--stop", "\u2603")
    assert ran.out == full[: full.index(stop)] + "\n"


@pytest.mark.usefixtures("kept_models")
def test_the_chat_template_is_applied_unless_raw(run: Run, chat_model: str, raw_model: str) -> None:
    common = ("--max-tokens", "8", "--exact", "--dtype", "float32")
    raw = functools.partial(run, "generate", "--target", raw_model, *common)
    chat = functools.partial(run, "generate", "--target", chat_model, *common)
    assert chat("hi").out == raw("u:hi a:").out
    assert chat("hi", "--raw").out == raw("hi").out
    assert chat("hi", "--system", "Be brief").out == raw("s:Be brief u:hi a:").out


def test_the_models_own_sampling_defaults_are_used_where_nothing_was_given(
    run: Run, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "sampling")
    own = {"do_sample": True, "temperature": 1.5, "top_k": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(own))
    generate = functools.partial(
        run, "generate", "abc", "--target", str(folder), "--max-tokens=8", "--dtype=float32"
    )
    ours = generate("--seed", "1")
    assert ours.code == 0
    assert generate("--seed", "1", "--temperature", "1.5", "--top-k", "5").out == ours.out
    greedy = generate("--temperature", "0")
    assert greedy.out == generate("--temperature", "0", "--seed", "2").out
    assert greedy.out != ours.out


def test_the_version_and_the_models_are_listed(run: Run) -> None:
    assert run("--version") == Ran(0, f"dspark {dspark.__version__}\n", "")
    listed = run("models")
    assert listed.code == 0
    assert [line.split("\t")[0] for line in listed.out.splitlines()] == [
        "smollm2-135m",
        "gemma3-270m",
        "v4-mini",
        "v4-mini-mtp",
    ]
    record = json.loads(run("models", "--json").out)
    assert {"llama", "qwen", "gemma"} <= set(record["families"])
    assert record["drafts"] == [{"name": "dspark-smollm2-135m", "target": "smollm2-135m"}]
    cached = [model["name"] for model in record["models"] if model["cached"]]
    assert cached == ["v4-mini", "v4-mini-mtp"]  # which are in the package


def test_running_the_module_is_running_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run("models", "--json")
    monkeypatch.setattr(sys, "argv", ["dspark", "models", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dspark", run_name="__main__")
    assert Ran(int(ended.value.code or 0), *capsys.readouterr()) == expected


def test_the_help_lists_every_command_with_its_first_words(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    listed = dict(
        line.strip().split(maxsplit=1)
        for line in ran.out.split("Commands:")[1].splitlines()
        if line
    )
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = re.findall(r"\n## dspark ([a-z-]+)\n\n    .*\n\n(.*)", page)
    assert len(sections) > 15
    assert list(listed) == [name for name, _ in sections]
    for name, text in sections:
        assert text.startswith(listed[name].removesuffix("...").rstrip(".")), name


def test_a_shell_may_ask_for_the_names_of_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_DSPARK_COMPLETE", "complete_bash")
    for words, expected in (
        ("dspark con", {"convert", "convert-draft"}),
        ("dspark models ", {"fetch", "remove", "path"}),
        ("dspark plan --cont", {"--context"}),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        ran = run()
        assert {line.split(",")[-1] for line in ran.out.split()} == expected


# -- bad input --------------------------------------------------------------------------------


def refused(ran: Ran, message: str, hint: str | None = None) -> None:
    """One sentence on stderr, exit code 2, nothing on stdout."""
    assert ran.code == 2
    assert ran.out == ""
    first, *rest = ran.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert [line.startswith("hint: ") for line in rest] in ([], [True])
    assert "Traceback" not in ran.err
    if hint is not None:
        assert hint in rest[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--temperature", "-1"], "temperature is -1.0, but must be a number >= 0"),
        (["hi", "--temperature", "nan"], "temperature is nan"),
        (["hi", "--top-p", "1.5"], "top_p is 1.5, but must be in (0, 1]"),
        (["hi", "--min-p", "2"], "min_p is 2.0"),
        (["hi", "--top-k", "-1"], "top_k is -1"),
        (["hi", "--n", "0"], "n is 0"),
        (["hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["hi", "--seed", "-1"], "seed is -1"),
        (["hi", "--stop", ""], "stop is"),
        (["hi", "--tree-budget", "-1"], "tree_budget is -1"),
        (["hi", "--rule", "lenient"], "rule is 'lenient', but must be one of auto, greedy"),
        (["hi", "--rule", "greedy", "--temperature", "1"], "greedy needs 0"),
        (["hi", "--target", "smollm-135m"], "did you mean 'smollm2-135m'?"),
        (["hi", "--target", "/none/such"], "no file or folder /none/such"),
        ([], "no prompt was given"),
        (["hi", "--file", "x"], "a prompt and --file were both given"),
        (["--file", "/none/such.txt"], "/none/such.txt cannot be read: No such file"),
        (["--file", "/"], "cannot be read: Is a directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    arguments: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.loading.load_target", lambda *_: pytest.fail("loaded"))
    refused(run("generate", *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["a" * 2048], "the prompt has 2048 tokens, but"),
        (["hi", "--system", "x"], "a system message was given, but the model has no chat"),
        (["hi", "--system", "x", "--raw"], "--raw leaves no place for one"),
        (["hi", "--dtype", "int3"], "dtype is 'int3', but must be auto"),
        (["hi", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["hi", "--draft", "none+lookup"], "needs two drafts"),
        (["hi", "--draft", "nothing-like-it"], "'nothing-like-it' is not a known model"),
        (["hi", "--draft", "dspark-smollm2"], "did you mean 'dspark-smollm2-135m'?"),
        (["hi", "--draft", "lookup:/none/such"], "lookup corpus /none/such cannot be read"),
        (
            ["hi", "--rule=block", "--width=3", "--temperature=1"],
            "block verification is for chains",
        ),
    ],
)
def test_bad_requests_are_one_sentence(arguments: list[str], message: str, generate: Run) -> None:
    refused(generate(*arguments), message)


def test_empty_and_broken_standard_input_is_one_sentence(generate: Run, tmp_path: Path) -> None:
    refused(generate("-"), "the prompt is empty")
    refused(generate("-", stdin=b"\xff\xfe"), "standard input is not UTF-8 text")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin1"))
    refused(generate("--file", str(tmp_path / "latin1.txt")), "latin1.txt is not UTF-8 text")
    refused(generate("caf\udce9"), "not valid Unicode")  # a Latin-1 argument


def test_an_argument_that_is_not_unicode_is_refused_by_a_chat_model_too(
    run: Run, chat_model: str
) -> None:
    refused(run("generate", "caf\udce9", "--target", chat_model), "not valid Unicode")


def test_wrong_options_are_usage_errors(run: Run) -> None:
    for arguments in (["--no-such-option"], ["generate", "x", "--n", "many"], ["sing"]):
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert "Traceback" not in ran.err
        assert "Error" in ran.err


def test_a_draft_with_another_vocabulary_is_refused(
    generate: Run, raw_model: str, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(table))
    refused(generate("hi", "--draft", str(other)), "another vocabulary", "a draft made for this")
    model = random_model("llama")
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "small")
    refused(
        generate("hi", "--draft", str(tmp_path / "small")),
        "a vocabulary of 64 tokens, but the target's has 96",
    )


def test_damaged_models_are_refused(run: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    generate = functools.partial(run, "generate", "hi", "--target", str(folder))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (np.random.default_rng(0).bytes(5000), whole[:-100], b""):
        weights.write_bytes(damage)
        refused(generate(), "model.safetensors is not a whole")
    weights.unlink()
    refused(generate(), str(folder))
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{")
    refused(generate(), "the tokenizer in")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    refused(generate(), "models of type 'mamba' cannot be tree-verified")
    (folder / "config.json").unlink()
    refused(generate(), "config.json")


def test_a_folder_with_brackets_and_a_plus_in_its_name_is_a_folder(
    run: Run, tmp_path: Path
) -> None:
    folder = str(save_model(tmp_path / "a+b [bold]x[/dim]"))
    ran = run("generate", "hi", "--target", folder, "--draft", folder, "--stats", "--max-tokens=3")
    assert ran.code == 0
    assert f"target {folder} (" in ran.err
    refused(run("generate", "hi", "--target", folder + "[/x]"), "[bold]x[/dim][/x]")


def test_no_space_for_a_model_is_one_sentence_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dspark.models.gguf_import.import_gguf", full)
    refused(run("generate", "hi", "--target", str(file)), "no space left on the disk", "free some")
    assert list(store.models_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    ran = run("generate", "hi", "--target", str(tmp_path / "m.gguf"))
    refused(ran, "cannot be written", "XDG_CACHE_HOME")


class FullDisk(io.StringIO):
    """Standard output redirected to a disk without space."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def flush(self) -> None:
        if self.getvalue():
            raise self._error


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_output_that_cannot_be_written_is_one_sentence(
    as_json: tuple[str, ...], generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk(OSError(errno.ENOSPC, "No space left on device")))
    refused(generate("hi", *as_json), "the output cannot be written: no space left")


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_reader_that_has_gone_is_no_error(
    as_json: tuple[str, ...], generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert generate("hi", *as_json) == Ran(0, "", "")


# -- Ctrl-C -----------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_text_so_far(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal before the 21st step; a stop string holds text back, which must come out."""
    options = ("abc", "--max-tokens", "60", "--draft", "none")
    whole = generate(*options).out
    step, steps = dspark.Engine.step, itertools.count()

    def interrupted(self: dspark.Engine) -> object:
        if next(steps) == 20:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(dspark.Engine, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ran = generate(*options, "--stop", "never to be seen")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.code == 130
    assert "Traceback" not in ran.err
    text = ran.out.removesuffix("\n")
    assert 16 <= len(text) < 60
    assert whole.startswith(text)


@pytest.mark.slow  # starts a process that imports torch
def test_ctrl_c_in_a_process_of_its_own_keeps_the_text_so_far(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "long", positions=100_000)
    # A shell that starts pytest in the background makes it, and its children, ignore SIGINT.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from dspark.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "generate", "abc", "--target", str(folder)]
    options = ["--max-tokens", "90000", "--no-exact", "--threads", "1", "--dtype", "float32"]
    # A stop string holds text back, which must come out as well.
    process = subprocess.Popen(
        [*command, *options, "--stop", "never to be seen"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    text = (first + out).decode()
    assert 16 <= len(text) < 90_000
    assert text.strip()


def test_ctrl_c_before_the_answer_is_exit_code_130(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspark.loading.load_target", interrupted)
    assert generate("hi") == Ran(130, "", "")


def interrupt_follow(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Let the user press Ctrl-C once, after some chunks of the next answer."""
    original = dspark.Engine.follow
    calls = itertools.count()

    def follow(self: dspark.Engine, request: object) -> Iterator[object]:
        is_first = next(calls) == 0
        for number, chunk in enumerate(original(self, request)):
            if is_first and number == chunks:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(dspark.Engine, "follow", follow)


# -- chat -------------------------------------------------------------------------------------


@pytest.fixture
def chat(run: Run, chat_model: str, kept_models: None) -> Run:
    return functools.partial(
        run, "chat", "--target", chat_model, "--max-tokens=8", "--dtype=float32", "--exact"
    )


def test_a_talk_over_a_pipe(chat: Run, run: Run, chat_model: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["/stats", "hello", "/stats", "and you", f"/save {saved}", "", "/reset", "hello"]
    ran = chat("--system", "Be brief", stdin="\n".join([*lines, "/sing", "/save", "/exit", "x"]))
    assert ran.code == 0
    answers = ran.out.splitlines()
    assert len(answers) == 3
    assert answers[2] == answers[0]
    assert answers[1] != answers[0]
    talk = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in talk] == ["Be brief", "hello", answers[0], "and you", answers[1]]
    assert list(tmp_path.iterdir()) == [saved]
    notes = ran.err
    assert "no answer yet" in notes
    assert "tau" in notes
    assert f"saved 4 messages to {saved}" in notes
    assert "forgotten" in notes
    assert "unknown command /sing; /reset forgets" in notes
    assert "give a file name" in notes
    common = ("--target", chat_model, "--max-tokens=8", "--dtype=float32", "--exact", "--raw")
    prompt = f"s:Be brief u:hello a:{answers[0]} u:and you a:"
    assert run("generate", prompt, *common).out == answers[1] + "\n"


def test_turns_of_a_talk_have_seeds_of_their_own(chat: Run) -> None:
    seeded = ("--seed", "4", "--temperature", "1.5")
    one, two, again = chat(*seeded, stdin="hi\nhi\n/reset\nhi\n").out.splitlines()
    assert one == again
    assert one != two
    assert chat(*seeded, stdin="hi\n").out == one + "\n"


def test_a_talk_that_outgrows_the_context_says_so_and_goes_on(chat: Run) -> None:
    ran = chat(stdin=f"hi\n{'x' * 300}\n/reset\nhi\n")
    assert ran.code == 0
    first, again = ran.out.splitlines()
    assert first == again
    assert "error: the prompt has 3" in ran.err
    assert "hint: " in ran.err


def test_ctrl_c_stops_the_answer_and_not_the_talk(
    chat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = chat("--draft", "none", stdin="hi\n").out.splitlines()
    interrupt_follow(monkeypatch, 3)
    ran = chat("--draft", "none", stdin="hi\n/reset\nhi\n")
    assert ran.code == 0
    cut, again = ran.out.splitlines()
    assert again == whole
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    chat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = chat(stdin="/save /none/such/talk.json\n/save [/x]/talk.json\n/[/x]\n/save .\n")
    assert ran.code == 0
    assert "error: /none/such/talk.json cannot be written: No such file or directory." in ran.err
    assert "error: [/x]/talk.json cannot be written" in ran.err
    assert "unknown command /[/x]" in ran.err
    assert "error: . cannot be written" in ran.err
    old = tmp_path / "talk.json"
    old.write_text("precious")

    class Full(type(old)):  # type: ignore[misc]
        def write_text(self, text: str, **options: str) -> int:
            super().write_text(text[:5], **options)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chat_command, "Path", Full)
    ran = chat(stdin=f"/save {old}\n")
    assert f"error: {old} cannot be written: No space left on device." in ran.err
    assert old.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [old]


def test_a_talk_needs_a_template_and_readable_input(chat: Run, run: Run, raw_model: str) -> None:
    refused(run("chat", "--target", raw_model), "has no chat template", "dspark generate")
    refused(run("chat", "--temperature", "-1"), "temperature is -1.0")
    refused(chat(stdin=b"\xff\n"), "standard input is not UTF-8 text")
