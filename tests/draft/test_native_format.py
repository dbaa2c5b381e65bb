"""The layout that training writes: what is read back proposes the same, and misfits are named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.draft.dspark import DSparkDrafter
from dspark.draft.formats.detect import is_draft, load_draft, load_module
from dspark.draft.formats.native import KEY, save_module
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from tests.draft.dspark_models import HEADS, STYLES, VOCAB, make_features, make_module, target_info
from tests.training.toys import ToyTeacher, make_trainable


class Target(ToyTeacher):
    def __init__(self, **changes):
        super().__init__()
        self.info = target_info(**changes)


class ShyTarget:
    """Shares embedding and head, but does not give rows away."""

    def __init__(self):
        self.info, self._teacher = target_info(), ToyTeacher()
        self.embed, self.unembed = self._teacher.embed, self._teacher.unembed


def tree_of(drafter, make_context):
    features = make_features(11, layers=drafter.capture)
    context = make_context(list(range(1, 13)), budget=9, features=features)
    return drafter.propose([context])[0].tree


def assert_same(module, folder, make_context, target=None):
    loaded = load_draft(folder, target or Target())
    assert loaded._module.config == module.config
    one, other = tree_of(DSparkDrafter(module.eval()), make_context), tree_of(loaded, make_context)
    assert one.num_nodes > 3
    assert one.token.tolist() == other.token.tolist()
    assert one.parent.tolist() == other.parent.tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("head", HEADS)
def test_what_is_written_is_read_back(tmp_path, make_context, style, head):
    module = make_module(style, head, sample_from_anchor=head != "none")
    folder = save_module(tmp_path / "d", module, storage="float32")
    assert_same(module, folder, make_context)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("anchor", [True, False])
def test_a_reduced_vocabulary_needs_only_its_ids(tmp_path, make_context, anchor):
    """With the target's head no row of it is stored."""
    module, _ = make_trainable(ids=range(5, VOCAB, 2), sample_from_anchor=anchor)
    module.requires_grad_(False)
    folder = save_module(tmp_path / "d", module, storage="float32")
    assert_same(module, folder, make_context)
    names = load_file(folder / "draft.safetensors")
    assert "vocab_ids" in names
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)


def test_a_soft_cap_of_the_target_is_kept(make_context):
    capped, _ = make_trainable(ids=range(48), teacher=ToyTeacher(softcap=2.0))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    teacher = ToyTeacher(softcap=2.0)
    torch.testing.assert_close(capped.base_logits(hidden), teacher.unembed(hidden)[:, :48])
    assert float(capped.base_logits(hidden).detach().abs().max()) <= 2.0


def test_int8_rows_are_off_by_half_a_step(tmp_path):
    module = make_module()
    folder = save_module(tmp_path / "d", module, storage="int8")
    loaded = load_module(folder, Target()).state_dict()
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 2:
            step = tensor.abs().amax(dim=1, keepdim=True) / 127
            assert bool(((loaded[name] - tensor).abs() <= 0.5001 * step).all()), name
    whole = (save_module(tmp_path / "f", module) / "draft.safetensors").stat().st_size
    assert (folder / "draft.safetensors").stat().st_size < 0.65 * whole


@pytest.fixture
def folder(tmp_path):
    return save_module(tmp_path / "draft", make_module())


def rewrite(folder, section, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    place = config[KEY] if section is None else config[KEY][section]
    if section == "backbone":
        place = config[KEY]["draft"]["backbone"]
    place.update(changes)
    path.write_text(json.dumps(config))


def test_it_is_told_apart_from_models(folder):
    assert is_draft(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"version": 2}, "version of dspark_draft is 2"),
        ("draft", {"block_size": 0}, "block_size is 0"),
        ("draft", {"block_size": "5"}, "block_size is '5'"),
        ("draft", {"speed": 3}, "speed is no field of DSparkConfig"),
        ("draft", {"target_layer_ids": [2, 1]}, "target_layer_ids"),
        ("draft", {"owns_head": 1}, "owns_head"),
        ("draft", {"backbone": 3}, "backbone"),
        (
            "draft",
            {"vocab_size": 97, "draft_vocab_size": 97},
            "vocab_size is 97, but the target toy has 96",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_named(folder, section, change, message):
    rewrite(folder, section, **change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_draft(folder, Target())


def test_a_missing_field_is_named(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[KEY]["draft"]["mask_token_id"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mask_token_id"):
        load_draft(folder, Target())


def test_scales_that_do_not_fit_are_named(tmp_path):
    folder = save_module(tmp_path / "d", make_module(), storage="int8")
    path = folder / "draft.safetensors"
    tensors = load_file(path)
    tensors["fc.weight.scale"] = tensors["fc.weight.scale"][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"fc\.weight\.scale"):
        load_draft(folder, Target())


def test_rows_of_the_head_must_be_given_away(tmp_path):
    module, _ = make_trainable(ids=range(48))
    folder = save_module(tmp_path / "d", module)
    with pytest.raises(CapabilityError, match="rows of the target's head"):
        load_draft(folder, ShyTarget())
