"""Whole runs on a tiny target: losses fall, drafts load, stops and kills leave no trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dspark import Engine, SamplingParams
from dspark.draft.formats.detect import load_module
from dspark.errors import ConfigError, DataError
from dspark.training.checkpoints import latest_checkpoint
from dspark.training.engine import StepEngine
from dspark.training.metrics import figures_of
from dspark.training.samples import anchors_of
from dspark.training.setup import prepare
from tests.training.runs import log_of, make_run, train, write_recipe, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


def test_a_run_leaves_a_draft_that_loads(folder):
    setup, outcome = train(folder)
    assert outcome.is_done
    assert outcome.reason == "done"
    assert outcome.step == 4
    lines = log_of(folder)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4]
    for name in ("last", "best"):
        loaded = load_module(folder / "out" / name, setup.target)
        assert loaded.config == setup.module.config
        assert torch.equal(loaded.vocab.ids, setup.module.vocab.ids)
    last = load_module(folder / "out" / "last", setup.target).state_dict()
    for key, tensor in setup.module.state_dict().items():
        assert torch.equal(last[key], tensor.to(torch.bfloat16).float()), key
    card = (folder / "out" / "best" / "README.md").read_text()
    assert "48 of 96 tokens" in card
    assert not list((folder / "out").rglob("*.part"))


@pytest.mark.usefixtures("module_cache")
def test_a_trained_draft_changes_no_text(folder):
    train(folder, run_steps=2)
    prompts = [[5, 7, 9, 11], [3, 1, 4, 1, 5, 9, 2, 6]]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    texts = []
    for draft in ("none", folder / "out" / "best"):
        engine = Engine.load(folder / "target", draft, exact=True)
        results = engine.generate(prompts, params)
        texts.append([result.token_ids for result in results])
    assert texts[0] == texts[1]
    assert sum(result.stats.verified for result in results) > 0


# -- overfitting ------------------------------------------------------------------------------


@pytest.mark.slow  # trains
@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_one_batch_is_learnt_by_heart(folder, kind):
    """tau of the batch reaches 0.95 of what a whole block gives."""
    changes = {
        "draft_kind": kind,
        "draft_markov_rank": 16 if kind == "dspark" else 0,
        "draft_vocabulary": None,
        "draft_style": "qwen3",
        "draft_layers": 2,
        "loss_ce": 0.0,
        "loss_l1": 1.0,
        "run_anchors": 12,
    }
    setup = prepare(make_run(folder, **changes), device="cpu")
    engine = StepEngine(setup)
    run = setup.recipe.run
    batch = [(sample, anchors_of(sample, run, 0)) for sample in setup.samples.train[:1]]
    gamma = setup.module.config.gamma
    for step in range(200):
        result = engine.step(batch, 5e-3 * (1 - step / 200))
    figures = figures_of(result.sums, engine.terms)
    assert figures.positions > 25
    assert figures.tau_greedy > 0.95 * (gamma + 1)
    assert figures.tau_sampling > 0.8 * (gamma + 1)


# -- stopping and going on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "cache"),
    [pytest.param("adamw", False, marks=pytest.mark.slow), ("muon", True)],
)
def test_a_stopped_run_goes_on_bitwise(folder, optimizer, cache):
    changes = {"optimizer_kind": optimizer, "run_tokens_per_forward": 64, "run_steps": 6}
    changes["run_validate_every"] = 3
    whole = {**changes, "run_cache": str(folder / "one")} if cache else changes
    parted = {**changes, "run_cache": str(folder / "two")} if cache else changes
    train(folder, "whole", **whole)
    _, outcome = train(folder, "parted", stop_after=3, **parted)
    assert outcome.reason == "enough"
    assert not outcome.is_done
    train(folder, "parted", stop_after=4, **parted)
    _, outcome = train(folder, "parted", **parted)
    assert outcome.is_done
    assert log_of(folder, "parted") == log_of(folder, "whole")
    same = Path("last") / "draft.safetensors"
    assert (folder / "parted" / same).read_bytes() == (folder / "whole" / same).read_bytes()


@pytest.mark.slow  # starts processes that import torch
def test_a_killed_run_goes_on_bitwise(folder):
    """SIGKILL between checkpoints, then the same command."""
    path = write_recipe(folder, run_steps=14, run_checkpoint_every=3, run_validate_every=7)
    command = [sys.executable, "-m", "dspark.cli", "train", str(path), "--quiet", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = folder / "killed"
    process = subprocess.Popen([*command, "--out", str(out)], env=environment)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"kind": "step"') > 6):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert latest_checkpoint(out) is not None
    steps_then = [line["step"] for line in log_of(folder, "killed") if line["kind"] == "step"]
    assert steps_then[-1] < 14
    subprocess.run([*command, "--out", str(out)], env=environment, check=True)
    subprocess.run([*command, "--out", str(folder / "whole")], env=environment, check=True)
    assert log_of(folder, "killed") == log_of(folder, "whole")
    assert len([line for line in log_of(folder, "killed") if line["kind"] == "step"]) == 14


@pytest.mark.slow  # starts a process that imports torch
def test_an_interrupted_command_writes_a_checkpoint(folder):
    path = write_recipe(folder, run_steps=100_000, run_checkpoint_every=100_000)
    command = [sys.executable, "-m", "dspark.cli", "train", str(path), "--threads", "1"]
    out = folder / "out"
    process = subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count('"kind": "step"') > 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted after step \d+ of 100000; run the same command", messages)
    assert "Traceback" not in messages
    steps = [line["step"] for line in log_of(folder) if line["kind"] == "step"]
    assert latest_checkpoint(out).name == f"step-{steps[-1]:08d}"


def test_only_the_newest_checkpoints_stay(folder):
    train(folder, run_keep=2, run_checkpoint_every=1)
    names = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


# -- what must be the same --------------------------------------------------------------------


def test_another_recipe_cannot_go_on(folder):
    train(folder, stop_after=1)
    with pytest.raises(ConfigError, match=r"draft\.block_size is 5, but .* with 4"):
        train(folder, draft_block_size=5)
    with pytest.raises(ConfigError, match=r"run\.seed"):
        train(folder, run_seed=1)


def test_the_length_of_a_run_may_change(folder):
    train(folder, stop_after=1)
    _, outcome = train(folder, run_steps=2)
    assert (outcome.step, outcome.total) == (2, 2)


def test_a_checkpoint_without_newer_keys_goes_on(folder):
    """What an older dspark did not know has its default, and goes on if that is what it was."""
    train(folder, stop_after=1)
    path = latest_checkpoint(folder / "out") / "state.json"
    state = json.loads(path.read_text())
    del state["recipe"]["draft"]["unroll"], state["recipe"]["loss"]["labels"]
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"loss\.labels is 'target', but .* with 'text'"):
        train(folder, loss_labels="target")
    assert train(folder, run_steps=2)[1].is_done


def test_other_data_cannot_go_on(folder):
    train(folder, stop_after=1)
    write_shard(folder / "shard.jsonl.gz", seed=1)
    with pytest.raises(ConfigError, match="other data"):
        train(folder)


# -- what is not finite -----------------------------------------------------------------------


def poison(monkeypatch, bad) -> None:
    """Make the features of the steps that `bad` names infinite."""
    from dspark.training import engine

    original, seen = engine.pack, [0]

    def pack(*args, **options):
        packed = original(*args, **options)
        seen[0] += 1
        if bad(seen[0]):
            packed.features[0, 0] = torch.inf
        return packed

    monkeypatch.setattr(engine, "pack", pack)


def test_a_step_that_is_not_finite_is_skipped_and_counted(folder, monkeypatch):
    poison(monkeypatch, lambda number: number == 2)
    setup, outcome = train(folder, run_tokens_per_forward=1000, run_validate_every=0)
    assert outcome.skipped == 1
    flags = [line["is_skipped"] for line in log_of(folder) if line["kind"] == "step"]
    assert flags == [False, True, False, False]
    assert all(torch.isfinite(p).all() for p in setup.module.parameters())
    assert all(line["loss"] is None for line in log_of(folder) if line.get("is_skipped"))


def test_ten_of_them_in_a_row_end_the_run(folder, monkeypatch):
    poison(monkeypatch, lambda number: number > 1)
    changes = {"run_tokens_per_forward": 1000, "run_validate_every": 0, "run_steps": 20}
    with pytest.raises(DataError, match=r"not finite in 10 steps in a row, up to step 11"):
        train(folder, **changes)
    assert latest_checkpoint(folder / "out").name == "step-00000010"


def test_a_damaged_checkpoint_is_named(folder):
    train(folder, stop_after=1)
    path = latest_checkpoint(folder / "out") / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    from dspark.errors import CheckpointError

    with pytest.raises(CheckpointError, match="step-00000001 cannot be read"):
        train(folder)
    shutil.rmtree(folder / "out")
    assert train(folder, run_steps=1)[1].is_done
