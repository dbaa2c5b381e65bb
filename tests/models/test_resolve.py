from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark.errors import CheckpointError
from dspark.models import ALIASES, find_cached, list_models, remove_model, resolve_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model; its weights are never loaded here."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.zeros((4, 4), np.float32)}, made / "model.safetensors")
    return made


def test_a_draft_in_the_layout_of_speculators_is_a_checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text('{"speculators_model_type": "dspark"}')
    assert resolve_model(folder) == folder


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_good_folder_is_itself(folder):
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("damage", ["random", "cut", "longer", "empty"])
def test_damaged_weights_are_refused_and_the_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    noise = np.random.default_rng(0).bytes(400)
    path.write_bytes(
        {"random": noise, "cut": data[:-5], "longer": data + b"x", "empty": b""}[damage]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole"):
        resolve_model(str(folder))


def test_a_missing_shard_is_named(folder):
    shard(folder)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors, which is missing"):
        resolve_model(str(folder))


def test_a_shard_without_its_tensor_is_named(folder):
    shard(folder)
    save_file({"c": np.zeros(1, np.float32)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors lacks b"):
        resolve_model(str(folder))


def test_a_shard_outside_the_folder_is_refused(folder):
    shard(folder)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"has no config\.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "does not say its model_type"),
    ],
)
def test_a_folder_without_a_proper_config_is_refused(folder, config, message):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        resolve_model(str(folder))


def test_a_folder_with_only_a_gguf_file_says_how_to_name_it(folder):
    (folder / "model.safetensors").rename(folder / "m.gguf")
    with pytest.raises(CheckpointError, match="holds no") as caught:
        resolve_model(str(folder))
    assert str(folder / "m.gguf") in str(caught.value.hint)


def test_an_unknown_name_gets_a_near_match():
    with pytest.raises(CheckpointError, match=r"did you mean 'smollm2-135m'\?") as caught:
        resolve_model("smollm-135m")
    assert caught.value.hint == "run: dspark models"
    with pytest.raises(CheckpointError, match=r"'zzz' is not a known model\."):
        resolve_model("zzz")


@pytest.mark.parametrize("spec", ["./none", "/none/such", "~/none-such-model", "x.gguf"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(spec):
    with pytest.raises(CheckpointError, match="no file or folder"):
        resolve_model(spec)


@pytest.mark.parametrize(("spec", "message"), [("", "empty"), ("hf:", "empty")])
def test_empty_and_reserved_names_are_refused(spec, message):
    with pytest.raises(CheckpointError, match=message):
        resolve_model(spec)


def test_a_file_that_is_not_gguf_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"only a \.gguf file") as caught:
        resolve_model(str(folder / "model.safetensors"))
    assert str(folder) in str(caught.value.hint)


def test_a_gguf_file_is_converted_once_whatever_its_name(tiny_gguf, tmp_path):
    cache = tmp_path / "cache"
    first = resolve_model(tiny_gguf, cache=cache)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert resolve_model(copy, cache=cache) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_bad_gguf_file_leaves_nothing(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 50)
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        resolve_model(tmp_path / "bad.gguf", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_hub_id_asks_for_no_pickles_and_is_checked(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("org/name@v1") == folder
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repo, **options):
        raise LocalEntryNotFoundError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="no local folder and cannot be downloaded") as caught:
        resolve_model("org/name")
    assert "\n" not in caught.value.message
    assert "network" in str(caught.value.hint)


def test_an_alias_is_listed_as_cached_only_when_it_is_there(index, tmp_path, monkeypatch):
    monkeypatch.setitem(ALIASES, "tiny", index.alias)
    cache = tmp_path / "cache"
    assert find_cached("tiny", cache=cache) is None
    folder = resolve_model("tiny", cache=cache, download=index.download)
    assert find_cached("tiny", cache=cache) == folder
    listed = [entry for entry in list_models(cache=cache) if not entry.alias.is_shipped]
    states = {entry.alias.name: entry.is_cached for entry in listed}
    assert states == {"smollm2-135m": False, "gemma3-270m": False, "tiny": True}
    remove_model(folder)
    assert find_cached("tiny", cache=cache) is None
    assert not folder.exists()


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dspark.models; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
