"""A tiny model with a chat template whose turns end in a special token, and prompt files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

import dspark
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.draft.lookup import LookupDrafter
from dspark.eval.prompts import PromptSet, Question
from dspark.registry import LoadOptions
from dspark.text import TextCodec
from dspark.training.data_answers import AnswerPlan
from dspark.training.data_engine import EngineAnswerer
from dspark.training.data_filters import FilterLimits
from dspark.training.data_manifest import read_manifest
from dspark.training.data_run import DataRun, Watcher
from dspark.training.data_shards import Row, read_rows
from dspark.training.data_spec import DataSpec, SelfPlan
from tests.conftest import probe_folder, random_model
from tests.test_engine import make_codec

TEMPLATE = (
    "{% if messages[0].role != 'system' %}s:be brief<eos>{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
EOS = 2
TURNS = (
    ("What is the tallest tower of the old town?",),
    ("abcabcabc xyz", "and once more please"),
    ("Name three rivers that flow north.",),
    ("Why does bread rise in a warm place?",),
    ("Count from ten down to one, slowly.",),
)


@functools.cache
def chat_codec() -> TextCodec:
    codec = make_codec()
    codec.tokenizer.chat_template = TEMPLATE
    return codec


def _model() -> Any:
    """The tiny llama, made to end its texts sooner."""
    model = random_model("llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 1.4
    return model


@functools.cache
def engine(draft: str = "none", *, exact: bool = True) -> dspark.Engine:
    options = LoadOptions(name="toy", exact=exact, probe_folder=probe_folder())
    target = wrap_model(
        _model(), adapter_for("llama"), options, eos_token_ids=(EOS,), fingerprint="ends sooner"
    )
    drafter = LookupDrafter() if draft == "lookup" else None
    return dspark.Engine(target, drafter=drafter, codec=chat_codec())


def save_chat_model(folder: Path) -> Path:
    """The model of `engine` as a folder, with template and tokenizer."""
    _model().save_pretrained(folder)
    chat_codec().tokenizer.save_pretrained(folder)
    return folder


def prompt_set(turns: tuple[tuple[str, ...], ...] = TURNS, name: str = "tiny") -> PromptSet:
    questions = [
        Question(question_id=i, category=name, turns=own) for i, own in enumerate(turns, start=1)
    ]
    return PromptSet(name=name, questions=tuple(questions))


def write_prompts(path: Path, turns: tuple[tuple[str, ...], ...] = TURNS) -> Path:
    path.write_text("".join(json.dumps({"turns": own}) + "\n" for own in turns))
    return path


def make_spec(**changes: Any) -> DataSpec:
    """A small set: every prompt greedily and at temperature 1, 8 tokens, four answers a shard."""
    settings: dict[str, Any] = {
        "target": {"id": "toy", "revision": None, "source": None, "fingerprint": "f" * 64},
        "sets": (prompt_set(),),
        "plan": AnswerPlan(temperatures=(0.0, 1.0), max_tokens=8, seed=5),
        "limits": FilterLimits(),
        "own": SelfPlan(),
        "shard_rows": 4,
    }
    return DataSpec(**{**settings, **changes})


def make_run(
    folder: Path,
    spec: DataSpec | None = None,
    *,
    answerer: Any = None,
    watcher: Watcher | None = None,
) -> DataRun:
    if answerer is None:
        answerer = EngineAnswerer(engine, batch=3)
    return DataRun(folder, spec or make_spec(), chat_codec(), answerer, watcher=watcher)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of answers and questions; there is no other but the manifest."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    assert "manifest.json" in files
    return {name: path.read_bytes() for name, path in files.items() if name != "manifest.json"}


def all_rows(folder: Path) -> list[Row]:
    shards = [entry["file"] for entry in read_manifest(folder)["shards"]]
    return [row for name in shards for row in read_rows(folder / name)]
