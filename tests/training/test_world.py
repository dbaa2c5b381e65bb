"""Two processes that share a run go through the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark.errors import ConfigError
from dspark.training.world import ALONE, World, open_world
from tests.training.runs import KINDS, write_recipe


def train(folder: Path, recipe: Path, name: str, processes: int, *extra: str) -> list[dict]:
    own = ["train", str(recipe), "--out", str(folder / name), "--quiet", "--threads", "1", *extra]
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "dspark.cli", *own], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
    text = (folder / name / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_two_processes_make_the_losses_of_one(tmp_path, optimizer, tolerance):
    """Muon may orthogonalise in bfloat16, where another order of a sum shows earlier."""
    changes = {"optimizer_kind": optimizer, "run_cache": str(tmp_path / "cache")}
    recipe = write_recipe(tmp_path, run_tokens_per_forward=40, **changes)
    one = train(tmp_path, recipe, "one", 1)
    train(tmp_path, recipe, "two", 2, "--max-minutes", "0")
    two = train(tmp_path, recipe, "two", 2)  # goes on from step 1
    assert len(one) == len(two) == 6
    for mine, other in zip(one, two, strict=True):
        assert mine["kind"] == other["kind"]
        assert mine["positions"] == other["positions"]
        for name in ("loss", "ce", "l1", "bce", "tau_sampling"):
            assert other[name] == pytest.approx(mine[name], rel=tolerance), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("owned", [False, True])
def test_so_do_two_that_train_eagle_3(tmp_path, owned):
    changes = {**KINDS["eagle3"], "draft_owns_head": owned, "run_steps": 3}
    recipe = write_recipe(tmp_path, run_tokens_per_forward=40, **changes)
    one = train(tmp_path, recipe, "one", 1)
    two = train(tmp_path, recipe, "two", 2)
    assert len(one) == len(two) == 5
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "l1", "tau_sampling"):
            assert other[name] == pytest.approx(mine[name], rel=1e-5), (mine["step"], name)
    folders = [tmp_path / name / "last" / "model.safetensors" for name in ("one", "two")]
    mine, other = (load_file(path) for path in folders)
    for name, tensor in mine.items():
        torch.testing.assert_close(other[name], tensor, rtol=0.02, atol=1e-3, msg=name)


def test_every_process_gets_as_many_parts():
    parts = list("abcde")
    dealt = [World(rank, 3).deal(parts) for rank in range(3)]
    assert {len(own) for own in dealt} == {2}
    counted = [part for own in dealt for part, counts in own if counts]
    assert sorted(counted) == parts
    assert [counts for _, counts in dealt[2]] == [True, False]
    assert ALONE.deal(parts) == [(part, True) for part in parts]


def test_strange_variables_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="torchrun"), open_world("cpu"):
        pass
