"""`dspark generate` under a schema, an expression or a grammar."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from dspark import cli
from tests.conftest import FAMILIES
from tests.grammar.toys import toy_codec

SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}'
CLOSED = SCHEMA[:-1] + ', "additionalProperties": false}'

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, module_cache: Path) -> str:
    """A tiny llama with the toys' tokenizer, in a folder; checks at load are kept for one run."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = FAMILIES["llama"]()
    config.vocab_size, config.num_hidden_layers = len(toy_codec().vocabulary()) + 4, 1
    config.eos_token_id = toy_codec().eos_token_ids[0]
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy_codec().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*arguments: str) -> tuple[int, str, str]:
        options = ("--target", model, "--threads=1", "--max-tokens=40")
        monkeypatch.setattr(sys, "argv", ["dspark", "generate", *options, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exc:
            code = int(exc.code or 0)
        return code, *capsys.readouterr()

    return invoke


def test_an_answer_fits_what_was_asked_for(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("Anna", "--json-schema", CLOSED, "--json-whitespace=compact")
    assert code == 0
    assert json.loads(out)["a"] in (1, 22)
    schema = tmp_path / "schema.json"
    schema.write_text(CLOSED)
    code, out, err = run(
        "Anna", "--json-schema", str(schema), "--json-whitespace=spaced", "--stats", "--compare"
    )
    assert code == 0
    assert out.strip() in ('{"a": 1}', '{"a": 22}')
    assert "all that the grammar allowed" in err
    assert "same text" in err
    grammar = tmp_path / "own.lark"
    grammar.write_text('start: "x" start "y" | "z"\n')
    code, out, _ = run("Anna", "--grammar", str(grammar), "--json", "--n=2", "--temperature=1")
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert code == 0
    assert all(text == "x" * (len(text) // 2) + "z" + "y" * (len(text) // 2) for text in texts)


def test_a_text_that_was_cut_is_noted(run: Run) -> None:
    code, out, err = run("Anna", "--regex", "a{50}", "--max-tokens=5")
    assert (code, set(out.strip())) == (0, {"a"})
    assert "cut before its grammar was complete" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--regex=a", "--json-schema={}"), "an answer has one grammar"),
        (("--regex=a(",), "unclosed group"),
        (('--json-schema={"not": {}}',), "not"),
        (("--json-schema=nowhere.json",), "nowhere.json cannot be read"),
        (("--grammar=nowhere.lark",), "nowhere.lark cannot be read"),
        (("--json-schema={}", "--json-whitespace=wide"), "must be one of free, spaced, compact"),
    ],
)
def test_errors(run: Run, options: tuple[str, ...], message: str) -> None:
    code, out, err = run("Anna", *options)
    assert (code, out) == (2, "")
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
