"""A trained model as a checkpoint: loads in the package, says what was trained, drafts its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dspark.base_model.checkpoint import Checkpoint
from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import ResidentExperts
from dspark.base_model.model import V4Model
from dspark.base_model.names import Storage, TensorSpec, expected_tensors
from dspark.engine import Engine
from dspark.errors import CheckpointError
from dspark.request import SamplingParams
from dspark.training.pretrain import export
from dspark.training.pretrain.attention import Notes
from dspark.training.pretrain.card import model_card
from dspark.training.pretrain.draft_trainer import DraftTraining, read_target
from dspark.training.pretrain.drafts import DSparkNetwork, MTPNetwork
from dspark.training.pretrain.legs import Leg, run_leg
from dspark.training.pretrain.network import (
    V4Network,
    initialise,
    official_tensors,
    rounded_experts,
)
from dspark.training.pretrain.settings import draft_config, read_recipe
from dspark.training.pretrain.tokenizer import save_tokenizer
from dspark.training.pretrain.trainer import TargetTraining
from tests.base_model.build import feed, open_slot, relative_error
from tests.training.pretrain import toys

RECIPE = toys.recipe()


@pytest.fixture(scope="module")
def trained() -> TargetTraining:
    training = TargetTraining(RECIPE, toys.tokens())
    for _ in range(3):
        training.advance()
    return training


@pytest.fixture(scope="module")
def packed(trained: TargetTraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    save_tokenizer(toys.tokenizer(), base / "tokens", max_positions=512)
    config = draft_config(RECIPE.model, "none")
    export.pack(
        base / "target", config, official_tensors(trained.network), base / "tokens", "card\n"
    )
    return base / "target"


def package_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    model = V4Model(checkpoint.config, checkpoint, ResidentExperts(checkpoint), dtype=torch.float32)
    cache = model.new_cache()
    return feed(model, cache, open_slot(cache), ids.tolist())


def test_the_packed_model_is_the_trained_one_within_its_rounding(trained, packed):
    """Exactly what `read_target` reads; FP8 and bfloat16 move logits by under a tenth."""
    ids = toys.tokens().streams["held-out", "code"].tokens[:40].astype("int64")
    rows = torch.from_numpy(ids)[None]
    theirs = package_logits(packed, rows[0])
    again = read_target(packed, draft_config(RECIPE.model, "none"))
    with torch.no_grad():
        same = again.logits(again(rows, Notes(indexer="select")).streams)
        trained.network.eval()
        with rounded_experts(trained.network):
            before = trained.network.logits(trained.network(rows, Notes(indexer="select")).streams)
    assert relative_error(theirs, same) < 1e-4
    assert 1e-5 < relative_error(theirs, before) < 0.1


def test_packing_what_is_packed_gives_the_same_numbers(packed, tmp_path):
    config = draft_config(RECIPE.model, "mtp")
    draft = MTPNetwork(config)
    initialise(draft, 1)
    export.add_draft(tmp_path / "both", packed, config, official_tensors(draft), "card\n")
    one, both = Checkpoint.open(packed), Checkpoint.open(tmp_path / "both")
    for name in one.names():
        if name.endswith(".weight") and one.tensor(name).dim() == 2:
            # A group whose largest number was rounded down may get half the scale, twice the codes.
            base = name.removesuffix(".weight")
            first, second = (c.stored(base).dequantise(torch.float32) for c in (one, both))
            assert torch.equal(first, second), name
        elif not name.endswith(".scale"):
            assert torch.equal(one.tensor(name), both.tensor(name)), name
    assert set(both.names()) > set(one.names())


def test_a_checkpoint_lacks_nothing_and_is_not_written_over(trained, packed, tmp_path):
    assert {path.name for path in packed.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tensors = official_tensors(trained.network)
    config = draft_config(RECIPE.model, "none")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export.pack(packed, config, tensors, packed, "")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        export.pack(tmp_path / "new", config, tensors, tmp_path, "")
    with pytest.raises(CheckpointError, match="no tensor mtp"):
        export.pack(tmp_path / "new", RECIPE.model, tensors, packed, "")
    assert not (tmp_path / "new").exists()


def answer(folder: Path, draft: str) -> tuple[Engine, list[int]]:
    engine = Engine.load(target=str(folder), draft=draft, dtype="float32", exact=False)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    [result] = engine.generate(["def add_1"], params)
    return engine, list(result.token_ids)


@pytest.fixture(scope="module")
def plain_answer(packed: Path) -> list[int]:
    return answer(packed, "none")[1]


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_the_whole_chain_generates_with_its_own_draft(kind, packed, plain_answer, tmp_path):
    target = read_target(packed, draft_config(RECIPE.model, "none"))
    training = DraftTraining(RECIPE, kind, target, toys.tokens())
    run_leg(training, tmp_path / "run", Leg(max_steps=1), lambda _: None)
    config = draft_config(RECIPE.model, kind)
    draft = export.draft_tensors(tmp_path / "run", kind, config)
    export.add_draft(tmp_path / "v4", packed, config, draft, "card\n")
    engine, drafted = answer(tmp_path / "v4", "auto")
    assert engine.drafter.name == kind
    assert drafted == plain_answer
    other = "mtp" if kind == "dspark" else "dspark"
    with pytest.raises(CheckpointError, match=f"trained '{kind}', but '{other}' is wanted"):
        export.draft_tensors(tmp_path / "run", other, config)


def test_the_card_names_text_licences_hours_and_figures():
    manifest = {
        "bytes": {"code": 10_000_000, "chat": 0},
        "licences": {"code": "Some Licence"},
        "notes": {"documentation": "none"},
        "holdout": 0.02,
        "python": "3.11.2",
        "sha256": "ab" * 32,
    }
    rows = [
        {"step": 1, "tokens": 3600, "tokens_per_second": 1.0, "threads": 1},
        {"step": 2, "tokens": 7200, "tokens_per_second": 0.5, "threads": 1},
    ]
    rows[1]["held_out"] = {"code": [0.5, 0.25]}
    losses = {"trained": {"code": 2.0}, "packed": {"code": 2.01}}
    card = model_card(RECIPE.model, manifest, {"target": rows, "dspark": rows}, losses)
    for part in (
        "code: 10.0 MB. Some Licence.",
        "target: 2 steps, 0.0 M tokens, 3.0 hours of 1 CPU thread\n",
        "| packed | 2.010 |",
        "code: 0.500 0.250",
        "1 sliding window only, 2 CSA, 1 HCA",
        "Own draft: DSpark",
        "ab" * 32,
    ):
        assert part in card


def packed_bytes(config: V4Config) -> int:
    """Bytes of the tensors of a packed checkpoint, from their shapes."""
    return sum(_bytes_of(spec) for spec in expected_tensors(config).values())


def _bytes_of(spec: TensorSpec) -> int:
    count = math.prod(spec.shape)
    if spec.storage is Storage.FP8:  # one scale for every square of 128
        return count + math.prod(-(-size // 128) for size in spec.shape)
    if spec.storage is Storage.EXPERT:  # two codes in a byte, one scale for every 32
        return count // 2 + count // 32
    return count * {Storage.BF16: 2, Storage.F32: 4, Storage.I64: 8}[spec.storage]


def mini_config(name: str) -> V4Config:
    return read_recipe(Path(__file__).parents[3] / "recipes" / f"{name}.toml").model


def test_packed_checkpoints_are_as_large_as_their_shapes_say(packed):
    assert packed_bytes(draft_config(RECIPE.model, "none")) == Checkpoint.open(packed).nbytes()


@pytest.mark.parametrize("name", ["v4-mini", "v4-mini-long"])
def test_the_shapes_of_v4_mini_take_at_most_40_mb(name):
    """Both draft modules counted, and a megabyte for the tokenizer and the rest."""
    config = mini_config(name)
    target, dspark, mtp = (
        packed_bytes(draft_config(config, kind)) for kind in ("none", "dspark", "mtp")
    )
    assert target < mtp < dspark
    assert dspark + (mtp - target) < 37e6
    assert config.dspark_block_size == 5


@pytest.mark.slow  # packs models of full size
@pytest.mark.parametrize("name", ["v4-mini", "v4-mini-long"])
def test_v4_mini_packs_to_at_most_40_mb(name, tmp_path):
    """Both draft modules counted, with the recipe's own shapes and untrained weights."""
    config = mini_config(name)
    network, draft = V4Network(config), DSparkNetwork(config)
    initialise(network, 0)
    initialise(draft, 1)
    save_tokenizer(toys.tokenizer(), tmp_path / "tokens", max_positions=512)
    tensors = {**official_tensors(network), **official_tensors(draft)}
    size = export.pack(tmp_path / "v4", config, tensors, tmp_path / "tokens", "")
    # MTP-1 is a stage like these, with two small projections.
    assert size + 1.2 * Checkpoint.open(tmp_path / "v4").nbytes("mtp.1.") < 38e6
    assert json.loads((tmp_path / "v4" / "config.json").read_text())["dspark_block_size"] == 5
