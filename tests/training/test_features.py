"""Target features: one ragged batch says what every sequence says alone; the cache keeps it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark.adapters.quantise import quantise_modules
from dspark.errors import CheckpointError
from dspark.target import SharesHeadRows
from dspark.training.feature_cache import FeatureCache, weights_checksum
from dspark.training.features import TargetRunner
from dspark.training.progress import SilentReporter
from dspark.training.samples import Sample
from dspark.training.setup import FeatureSource, prepare
from dspark.training.trainer import Trainer
from dspark.training.world import World
from tests.conftest import FAMILIES, VOCAB, random_model, random_target
from tests.training.runs import make_run, train

LAYERS = (-1, 0, 1)


def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    return [
        Sample(index, rng.integers(0, VOCAB, length), start, "toy")
        for index, length, start in ((4, 19, 5), (7, 30, 11), (9, 8, 6))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_stock_model(family):
    target = random_target(family, exact=False)
    model = random_model(family)
    runner = TargetRunner(target, LAYERS, temperature=1.7)
    for sample, own in zip(samples(), runner.run(samples()), strict=True):
        with torch.no_grad():
            tokens = torch.from_numpy(sample.tokens)[None]
            out = model(tokens, output_hidden_states=True, use_cache=False)
        logits = out.logits[0, sample.start : -1]
        for place, layer in enumerate(LAYERS):
            wanted = out.hidden_states[layer + 1][0, :-1]
            found = own.hidden[:, place * 64 : (place + 1) * 64]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            own.final, out.hidden_states[-1][0, sample.start : -1], rtol=1e-3, atol=1e-4
        )
        total = torch.logsumexp(logits / 1.7, dim=-1)
        torch.testing.assert_close(own.total, total, rtol=1e-4, atol=1e-4)
        assert own.best.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma4"])
def test_rows_of_the_head_give_its_logits(family):
    """Also where the head's weights are packed, and with a soft-cap."""
    target = random_target(family, exact=False)
    assert isinstance(target, SharesHeadRows)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 4, 50, 95])
    with torch.no_grad():
        wanted = target.unembed(hidden)
    for chosen in (None, ids):
        rows = target.head_rows(chosen)
        logits = hidden @ rows.weight.T
        if rows.softcap is not None:
            logits = rows.softcap * torch.tanh(logits / rows.softcap)
        expected = wanted if chosen is None else wanted[:, chosen]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert not rows.weight.is_inference()


def test_features_can_be_trained_on():
    (own, *_) = TargetRunner(random_target("llama", exact=False), (0,)).run(samples())
    weight = torch.ones(64, 3, requires_grad=True)
    (own.hidden @ weight).sum().backward()
    assert weight.grad is not None


class CountingRunner:
    def __init__(self, runner: TargetRunner) -> None:
        self.runner, self.seen = runner, []

    def run(self, wanted):
        self.seen.append([sample.index for sample in wanted])
        return self.runner.run(wanted)


def make_source(folder, about, **options):
    runner = CountingRunner(
        TargetRunner(random_target("llama", exact=False), (0, 2), stored=torch.bfloat16)
    )
    cache = FeatureCache(folder, about, **options)
    return FeatureSource(runner, cache), runner, cache


def test_the_cache_gives_back_what_was_computed(tmp_path):
    source, runner, _ = make_source(tmp_path, {"target": "toy"})
    fresh = source.get(samples())
    assert runner.seen == [[4, 7, 9]]
    waiting = source.get(samples()[:1])
    source.flush()
    again, later, cache = make_source(tmp_path, {"target": "toy"})
    assert len(cache) == 3
    for one, other in zip(fresh, again.get(samples()), strict=True):
        for name in ("hidden", "final", "total", "best"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert later.seen in ([], [[]])
    assert torch.equal(waiting[0].hidden, fresh[0].hidden)
    about = json.loads((cache.folder / "about.json").read_text())
    assert about == {"target": "toy"}


def test_only_what_is_missing_is_computed(tmp_path):
    source, runner, _ = make_source(tmp_path, {"target": "toy"})
    source.get(samples()[1:2])
    alone = source.get(samples())
    assert runner.seen == [[7], [4, 9]]
    assert [own.hidden.shape[0] for own in alone] == [18, 29, 7]


def test_data_that_grew_find_what_was_computed(tmp_path):
    """By what a sample says, not by its place; the same answer twice is one."""
    source, _, _ = make_source(tmp_path, {"target": "toy"})
    fresh = source.get(samples())
    source.flush()
    again, runner, _ = make_source(tmp_path, {"target": "toy"})
    moved = [replace(sample, index=sample.index + 10) for sample in samples()]
    other = replace(moved[0], start=moved[0].start + 1)
    found = again.get([moved[2], other, moved[0], other])
    assert runner.seen == [[other.index]]
    assert torch.equal(found[0].hidden, fresh[2].hidden)
    assert torch.equal(found[2].final, fresh[0].final)
    assert torch.equal(found[1].final, found[3].final)
    assert found[1].final.shape[0] == fresh[0].final.shape[0] - 1


def test_other_features_have_another_folder(tmp_path):
    make_source(tmp_path, {"target": "toy"})[0].get(samples())
    _, _, cache = make_source(tmp_path, {"target": "other"})
    assert len(cache) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_part_is_named(tmp_path):
    source, _, cache = make_source(tmp_path, {"target": "toy"})
    source.get(samples())
    source.flush()
    (part,) = cache.folder.glob("part-*.safetensors")
    part.write_bytes(part.read_bytes()[:64])
    with pytest.raises(CheckpointError, match="part-00000"):
        make_source(tmp_path, {"target": "toy"})


def test_processes_of_one_run_read_each_other_s_parts(tmp_path):
    worlds = [World(rank, 2) for rank in range(2)]
    one, other = (make_source(tmp_path, {"target": "toy"}, world=world) for world in worlds)
    made = one[0].get(samples()[:2])
    one[0].flush()
    found = other[0].get(samples())
    assert other[1].seen == [[9]]
    assert torch.equal(found[1].hidden, made[1].hidden)


@pytest.mark.parametrize("place", [0, 300_000, 3_999_999])
def test_weights_are_told_apart_wherever_they_differ(tmp_path, place):
    data = bytearray(4_000_000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    before = weights_checksum(tmp_path)
    assert before == weights_checksum(tmp_path)
    data[place] = 1
    file.write_bytes(data)
    assert weights_checksum(tmp_path) != before


def test_a_target_with_other_weights_at_the_end_has_features_of_its_own(tmp_path):
    recipe = make_run(tmp_path, run_cache=str(tmp_path / "cache"))
    for _ in range(2):
        prepare(recipe, device="cpu")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    file = tmp_path / "target" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    prepare(recipe, device="cpu")
    assert len(list((tmp_path / "cache").iterdir())) == 2


# -- a rounded target -------------------------------------------------------------------------


def test_a_run_learns_from_the_rounded_target(tmp_path):
    """Its features are those of the weights as they are rounded, and are kept apart."""
    found = {}
    for quant in ("none", "int8"):
        recipe = make_run(tmp_path, run_cache=str(tmp_path / "cache"), run_target_quant=quant)
        setup = prepare(recipe, device="cpu")
        assert setup.target.info.quant == quant
        found[quant] = setup.source.get(setup.samples.train[:2])
        setup.source.flush()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    quantise_modules(model, "int8")
    sample = setup.samples.train[0]
    with torch.no_grad():
        tokens = torch.from_numpy(sample.tokens)[None]
        logits = model(tokens, use_cache=False).logits[0, sample.start : -1]
    wanted = torch.logsumexp(logits, dim=-1)
    off = {quant: float((own[0].total - wanted).abs().mean()) for quant, own in found.items()}
    assert off["int8"] < 1e-3  # kept features are bfloat16
    assert off["none"] > 3 * off["int8"], off


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_going_on_with_another_rounding_is_said(tmp_path):
    train(tmp_path, stop_after=2)
    setup = prepare(make_run(tmp_path, run_target_quant="int8"), device="cpu")
    notes = Notes()
    outcome = Trainer(setup, tmp_path / "out", reporter=notes).run(lambda: None)
    assert outcome.step == 4
    assert any("run.target_quant was 'none' and is 'int8'" in note for note in notes.said)
    assert "rounded to int8" in (tmp_path / "out" / "best" / "README.md").read_text()
