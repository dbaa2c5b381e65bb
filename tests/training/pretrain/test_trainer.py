"""Training of the target: it learns, and a leg goes on exactly where the last one was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark.errors import CheckpointError, ConfigError
from dspark.training.pretrain.legs import Leg, resume, run_leg
from dspark.training.pretrain.optimizer import orthogonalise
from dspark.training.pretrain.settings import ScheduleRecipe, make_recipe, read_recipe
from dspark.training.pretrain.state import find_state, load_state, read_log
from dspark.training.pretrain.trainer import TargetTraining, text_losses
from tests.training.pretrain import toys

pytestmark = pytest.mark.slow  # trains


def silent(_: str) -> None:
    """Report nothing."""


def train(folder: Path, *stops: int | None) -> TargetTraining:
    """Train in legs that end at these steps."""
    for stop in stops:
        training = TargetTraining(toys.recipe(), toys.tokens())
        run_leg(training, folder, Leg(max_steps=stop), silent)
    return training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TargetTraining, Path]:
    """A run without interruption, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, None), folder


def comparable(folder: Path) -> list[dict[str, object]]:
    rows = read_log(folder)
    for row in rows:
        del row["tokens_per_second"]
    return rows


@pytest.mark.slow  # trains
def test_loss_falls_on_a_toy_text():
    stage = {"steps": 20, "length": 32, "sequences": 4}
    recipe = toys.recipe(stage=[stage], schedule={"warmup": 2, "fall": 0.3})
    training = TargetTraining(recipe, toys.tokens())
    before = text_losses(training.network, toys.tokens(), recipe.stages[0], rows=2)
    for _ in range(20):
        training.advance()
    after = training.validate()
    assert all(before[kind] > 5.5 for kind in ("code", "docs"))  # log 384 is 5.95
    assert all(after[kind] < 3.5 for kind in ("code", "docs"))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, tmp_path):
    legs = train(tmp_path / "legs", 3, 5, 7, None)
    expected, found = whole[0].tensors(), legs.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert comparable(whole[1]) == comparable(tmp_path / "legs")
    assert [row["step"] for row in read_log(tmp_path / "legs")] == list(range(1, 11))
    assert {row["step"] for row in read_log(tmp_path / "legs") if "held_out" in row} == {4, 8, 10}


@pytest.mark.slow  # starts processes that import torch
def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path):
    """The process is killed while it trains; half a state and half a line are left behind."""
    script = (
        "from pathlib import Path; from tests.training.pretrain.test_trainer import train; "
        f"train(Path({str(tmp_path / 'run')!r}), None)"
    )
    root = Path(__file__).parents[3]
    child = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    try:
        deadline = time.monotonic() + 120
        while find_state(tmp_path / "run") is None and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    partial = tmp_path / "run" / "state" / ".partial-1"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    with (tmp_path / "run" / "log.jsonl").open("a") as handle:
        handle.write('{"step": 11, "lo')
    resumed = train(tmp_path / "run", None)
    assert not partial.exists()
    assert all(torch.equal(v, resumed.tensors()[k]) for k, v in whole[0].tensors().items())
    assert comparable(tmp_path / "run") == comparable(whole[1])


def test_two_states_are_kept_and_a_damaged_one_is_named(tmp_path):
    train(tmp_path, 4)
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert kept == ["step-00000003", "step-00000004"]
    weights = tmp_path / "state" / "step-00000004" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-00000004 cannot be read") as caught:
        train(tmp_path, None)
    assert "remove this folder" in str(caught.value.hint)


@pytest.mark.parametrize("what", ["model", "seed", "text"])
def test_a_state_of_another_run_is_refused(what, tmp_path):
    train(tmp_path, 1)
    other, tokens = toys.recipe(), toys.tokens()
    if what == "model":
        other = replace(other, model=replace(other.model, routed_scaling_factor=2.0))
    elif what == "seed":
        other = replace(other, run=replace(other.run, seed=1))
    else:
        streams = dict(tokens.streams)
        del streams["held-out", "docs"]
        tokens = replace(tokens, streams=streams)
    with pytest.raises(CheckpointError, match=f"another {what}"):
        resume(TargetTraining(other, tokens), tmp_path)


def test_schedule_and_stages_may_change_between_legs(tmp_path):
    train(tmp_path, 2)
    stages = (replace(toys.recipe().stages[0], steps=3, sequences=2),)
    training = TargetTraining(replace(toys.recipe(), stages=stages), toys.tokens())
    result = run_leg(training, tmp_path, Leg(), silent)
    assert (result.step, result.tokens, result.is_done) == (3, 2 * 4 * 32 + 2 * 32, True)


def test_a_leg_ends_in_time_and_writes_its_state(tmp_path):
    training = TargetTraining(toys.recipe(), toys.tokens())
    result = run_leg(training, tmp_path, Leg(max_minutes=0.0), silent)
    assert (result.step, result.is_done) == (1, False)
    state = find_state(tmp_path)
    assert state is not None
    assert load_state(state)[1]["step"] == 1


def test_the_indexer_learns_only_in_stages_that_say_so(tmp_path):
    def indexer(training: TargetTraining) -> torch.Tensor:
        return training.network.layers[1].attn.indexer.wq_b.weight.detach().clone()

    training = TargetTraining(toys.recipe(), toys.tokens())
    start, found = indexer(training), {}
    for step in range(10):
        found[step] = training.advance()["index"]
        assert torch.equal(indexer(training), start) == (step < 4)
    assert all((found[step] > 0) == (step >= 4) for step in found)


def test_biases_move_towards_an_even_load():
    training = TargetTraining(toys.recipe(), toys.tokens())
    training.advance()
    bias = training.network.layers[2].ffn.gate.bias
    speed = training.recipe.run.bias_speed
    assert {round(abs(b) / speed) for b in bias.tolist()} <= {0, 1}
    assert bias.min() < 0 < bias.max()


def test_schedule_rises_stays_and_falls():
    schedule = ScheduleRecipe(warmup=4, fall=0.5, floor=0.1)
    factors = [schedule.factor(step, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[10] == 1.0
    assert factors[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert ScheduleRecipe(warmup=0, fall=0).factor(0, 1) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": {}}, "no section models"),
        ({"text": {"vocab": 1}}, "no key text.vocab"),
        ({"text": {"vocabulary": 8.0}}, "text.vocabulary is 8.0"),
        ({"text": {"vocabulary": 8}}, "text.vocabulary is 8, but must be 320 to 65536"),
        ({"stage": []}, "lacks"),
        ({"stage": [{"steps": 1, "length": 4}]}, "lacks stage.sequences"),
        ({"stage": [{**toys.RECIPE["stage"][0], "indexer": "on"}]}, "stage.indexer is 'on'"),
        ({"optimizer": {"newton_schulz": [0, 2]}}, r"optimizer.newton_schulz is \[0, 2\]"),
        ({"model": {**toys.RECIPE["model"], "o_groups": 3}}, "not a multiple of o_groups"),
        ({"model": {**toys.RECIPE["model"], "compress_ratios": 4}}, "must be a list"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe({**toys.RECIPE, **values})


@pytest.mark.parametrize(("steps", "least", "most"), [((8, 2), 0.98, 1.02), ((5, 0), 0.6, 1.3)])
def test_newton_schulz_makes_singular_values_equal(steps, least, most):
    draws = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 16, 40, generator=draws)
    values = torch.linalg.svdvals(orthogonalise(stack, steps))
    assert least < values.min()
    assert values.max() < most


@pytest.mark.parametrize("name", ["v4-mini", "v4-mini-long"])
def test_the_recipes_of_v4_mini_have_every_kind_of_layer(name):
    recipe = read_recipe(Path(__file__).parents[3] / "recipes" / f"{name}.toml")
    kinds = {recipe.model.layer_kind(i).value for i in range(recipe.model.num_hidden_layers)}
    assert len(kinds) == 3
    assert 0 < recipe.model.num_hash_layers < recipe.model.num_hidden_layers
    assert json.dumps(recipe.to_json())
