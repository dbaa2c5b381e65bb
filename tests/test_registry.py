"""Which code loads a model: entry points, and refusals of what cannot be tree-verified."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from dspark import registry
from dspark.adapters.base import FamilyAdapter
from dspark.adapters.hf import load as hf_load
from dspark.errors import CapabilityError, CheckpointError
from dspark.registry import LoadedTarget, LoadOptions, TargetLoader, find_loader, load_target
from tests.conftest import FAMILIES, random_target


class Point:
    """An entry point of another package."""

    def __init__(self, name: str, item: object) -> None:
        self.name = name
        self._item = item

    def load(self) -> object:
        return self._item


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """Add an object under an entry-point group."""
    extra: dict[str, list[Point]] = {}

    def patched(original: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda *, group: [*original(group=group), *extra.get(group, [])]

    for module in (registry, hf_load):
        monkeypatch.setattr(module, "entry_points", patched(module.entry_points))

    def add(group: str, item: object) -> None:
        extra.setdefault(group, []).append(Point("third-party", item))

    return add


class Loader:
    """A loader for models of type "mine"."""

    def __init__(self, priority: int = 1, kind: str = "mine") -> None:
        self.priority = priority
        self.kind = kind

    def handles(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.kind

    def load(self, folder: Path, options: LoadOptions) -> LoadedTarget:
        return LoadedTarget(target=random_target(), codec=None, folder=folder)


def folder_of(tmp_path: Path, config: Any) -> Path:
    """A folder with a config and no weights: a refusal must not need them."""
    if isinstance(config, dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        config.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> LoadedTarget:
    return load_target(folder, LoadOptions(name="a model", exact=False))


def test_every_family_under_test_has_an_adapter() -> None:
    for make in FAMILIES.values():
        kind = make().model_type
        assert kind in hf_load.adapter_for(kind).model_types
    assert {a.family for a in hf_load.adapters().values()} == {"llama", "qwen", "gemma"}


def test_a_third_partys_adapter_is_found(register: Callable[[str, object], None]) -> None:
    mine = FamilyAdapter(family="olmo", model_types=("olmo2",))
    with pytest.raises(CapabilityError, match="olmo2"):
        hf_load.adapter_for("olmo2")
    register("dspark.adapters", mine)
    assert hf_load.adapter_for("olmo2") is mine
    assert "olmo2" in hf_load.adapters()


def test_a_third_partys_loader_is_found_and_asked_by_priority(
    register: Callable[[str, object], None], tmp_path: Path
) -> None:
    low, high = Loader(1), Loader(5)
    assert isinstance(low, TargetLoader)
    register("dspark.targets", low)
    register("dspark.targets", high)
    assert find_loader({"model_type": "mine"}) is high
    assert find_loader({"model_type": "llama"}) is hf_load.LOADER
    loaded = load(folder_of(tmp_path, {"model_type": "mine"}))
    assert loaded.target is random_target()
    assert loaded.folder == tmp_path


def test_a_loader_of_higher_priority_may_take_a_type_that_transformers_has(
    register: Callable[[str, object], None],
) -> None:
    fast = Loader(kind="llama")
    register("dspark.targets", fast)
    assert find_loader({"model_type": "llama"}) is fast


def test_a_config_that_nothing_handles_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no installed loader handles"):
        find_loader({"architectures": ["Mine"]})


@pytest.mark.parametrize("kind", ["bert", "gpt2", "nobody-knows-this"])
def test_an_unknown_type_is_refused_and_the_known_ones_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=kind) as caught:
        load(folder_of(tmp_path, {"model_type": kind}))
    for known in hf_load.adapters():
        assert known in caught.value.message
    assert "entry point" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    ["MambaConfig", "Qwen3NextConfig", "RecurrentGemmaConfig", "Lfm2Config", "RwkvConfig"],
)
def test_recurrent_and_linear_attention_families_are_refused(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, name)()
    with pytest.raises(CapabilityError, match=f"type '{config.model_type}' cannot be tree-verif"):
        load(folder_of(tmp_path, config))


@pytest.mark.parametrize(
    ("name", "layers"), [("Qwen3NextConfig", "linear_attention"), ("Lfm2Config", "conv")]
)
def test_layers_with_a_running_state_are_refused_even_if_an_adapter_claims_them(
    name: str, layers: str, register: Callable[[str, object], None], tmp_path: Path
) -> None:
    config = getattr(transformers, name)(
        num_hidden_layers=2, layer_types=[layers, "full_attention"]
    )
    register("dspark.adapters", FamilyAdapter(family="bold", model_types=(config.model_type,)))
    with pytest.raises(CapabilityError, match=f"has {layers} layers, whose state cannot be"):
        load(folder_of(tmp_path, config))


_ROPE = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("kind", _ROPE)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rotary_types_that_look_at_the_longest_position_are_refused(
    kind: str, field: str, tmp_path: Path
) -> None:
    """With them a request's text would depend on its neighbours in the batch."""
    config = FAMILIES["llama"]().to_dict()
    config.pop("rope_parameters", None)
    config[field] = {"rope_type": kind, "rope_theta": 10_000.0, **_ROPE[kind]}
    with pytest.raises(CapabilityError, match="longest request of a batch"):
        load(folder_of(tmp_path, config))


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_other_rotary_types_are_not_refused(kind: str, tmp_path: Path) -> None:
    config = FAMILIES["llama"]().to_dict()
    config["rope_parameters"] = {
        "rope_type": kind,
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
    }
    if kind == "llama3":
        config["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(CheckpointError, match="weights"):  # not there, but looked for
        load(folder_of(tmp_path, config))


def test_a_family_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = FAMILIES["gemma3"]()
    config.use_bidirectional_attention = True
    with pytest.raises(CapabilityError, match="looks ahead"):
        load(folder_of(tmp_path, config))


def test_code_that_comes_with_a_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user asked: a pipe has nobody to answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    config = {"model_type": "mine-too", "auto_map": {"AutoConfig": "mine.Config"}}
    with pytest.raises(CapabilityError, match="mine-too"):
        load(folder_of(tmp_path, config))


def test_a_config_with_a_field_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_size"):
        load(folder_of(tmp_path, {"model_type": "llama", "hidden_size": "x"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"has no config\.json"), ("{", "cannot be read as JSON"), ("[]", "JSON object")],
)
def test_a_folder_without_a_proper_config_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "dspark_draft", "architectures": ["DSparkDraft"], "dspark_draft": {}},
        {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]},
    ],
)
def test_a_draft_module_is_no_target(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a model is a draft module") as refusal:
        load(folder_of(tmp_path, config))
    assert "--draft" in (refusal.value.hint or "")
