"""A tiny target on disk, shards of its answers, recipes for both."""

from __future__ import annotations

import atexit
import functools
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dspark.training.progress import SilentReporter
from dspark.training.recipe import Recipe, make_recipe
from dspark.training.setup import prepare
from dspark.training.trainer import Trainer
from tests.conftest import VOCAB, random_model

_UNROLLED: dict[str, Any] = {
    "draft_block_size": None,
    "draft_mask_token_id": None,
    "draft_markov_rank": None,
    "draft_unroll": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {},
    "eagle3": {"draft_kind": "eagle3", **_UNROLLED},
    "mtp": {"draft_kind": "mtp", **_UNROLLED, "draft_target_layers": None},
}
"""Changes that make a recipe's draft one of a kind."""


def write_target(folder: Path, family: str = "llama") -> Path:
    """A random model, Llamas of four layers, hidden size 64."""
    random_model(family, layers=4 if family == "llama" else None).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(0, 0))  # the same weights are checked once
    return folder


def write_shard(path: Path, count: int = 12, *, seed: int = 0, longest: int = 40) -> Path:
    rng = np.random.default_rng(seed)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(count):
            prompt = rng.integers(0, VOCAB, int(rng.integers(3, 12))).tolist()
            response = rng.integers(0, VOCAB, int(rng.integers(8, longest))).tolist()
            line = {"prompt_ids": prompt, "response_ids": response, "source": "toy"}
            file.write(json.dumps(line) + "\n")
    return path


def recipe_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a small recipe; `changes` are section_key=value."""
    values: dict[str, Any] = {
        "target": str(folder / "target"),
        "draft": {
            "layers": 1,
            "block_size": 4,
            "target_layers": 2,
            "mask_token_id": 4,
            "markov_rank": 8,
            "vocabulary": 48,
        },
        "data": {"shards": [str(folder / "shard.jsonl.gz")], "validation_share": 0.2},
        "loss": {},
        "optimizer": {"lr": 3e-3},
        "schedule": {},
        "run": {
            "steps": 4,
            "sequences_per_step": 3,
            "tokens_per_forward": 128,
            "anchors": 0.5,
            "checkpoint_every": 2,
            "validate_every": 2,
            "dtype": "float32",
            "target_dtype": "float32",
        },
    }
    for name, value in changes.items():
        section, _, key = name.partition("_")
        if value is None:
            values[section].pop(key, None)
        else:
            values[section][key] = value
    return values


@functools.cache
def _made_once() -> Path:
    """A folder with target and shard, which lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="dspark-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_target(folder / "target")
    write_shard(folder / "shard.jsonl.gz")
    return folder


def make_run(folder: Path, **changes: Any) -> Recipe:
    """A recipe whose target and shard exist."""
    if not (folder / "target").exists():
        shutil.copytree(_made_once(), folder, dirs_exist_ok=True)
    return make_recipe(recipe_values(folder, **changes))


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The same as a TOML file."""
    make_run(folder, **changes)
    lines = []
    values = recipe_values(folder, **changes)
    for name, section in values.items():
        if isinstance(section, dict):
            lines.append(f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in section.items()]
        else:
            lines.insert(0, f"{name} = {json.dumps(section)}")
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(folder: Path, name: str = "out", stop_after: int | None = None, **changes: Any):
    """Run a recipe, or a part of it; returns what it was set up with and how it ended."""
    setup = prepare(make_run(folder, **changes), device="cpu")
    trainer = Trainer(setup, folder / name, reporter=SilentReporter())

    def should_stop():
        return "enough" if trainer.step == stop_after else None

    return setup, trainer.run(should_stop)


def log_of(folder: Path, name: str = "out") -> list[dict]:
    """The log of a run, without the times."""
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
        line.pop("target_seconds", None)
    return lines
