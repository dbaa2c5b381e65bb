"""A saved V4 checkpoint behind the engine and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dspark import SamplingParams, cli
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.base_model.indexer import Indexer
from dspark.draft.model import ModelDrafter
from dspark.engine import Engine
from dspark.errors import CapabilityError, CheckpointError, ConfigError
from dspark.loading import load_engine
from dspark.models.fetch import cache_root
from dspark.registry import LoadedTarget, LoadOptions, load_target
from dspark.target import SharesHead
from tests.base_model.conftest import SMALL

LAYOUTS = ("official", "transformers")
GREEDY = SamplingParams(max_tokens=5)
COUPLED = replace(GREEDY, temperature=1.0, seed=5)


@pytest.fixture(scope="module", autouse=True)
def probes(module_cache: Path) -> Path:
    """Where loading keeps what it found about exact mode: every checkpoint is checked once."""
    return cache_root() / "probes"


@pytest.fixture(scope="module")
def loaded(v4_folders: dict[str, Path], probes: Path) -> dict[str, LoadedTarget]:
    """Both in exact mode, which is checked for one of them: the other has the same config."""
    checked = LoadOptions(name="v4", dtype="float32", exact=True, probe_folder=probes)
    official = load_target(v4_folders["official"], checked)
    other = load_target(v4_folders["transformers"], replace(checked, exact=False))
    other.target.switch_exact(True)
    return {"official": official, "transformers": other}


def prompts() -> list[list[int]]:
    """5, 13 and 41 tokens: the second text fills the window of 16 and an entry of every kind."""
    rng = np.random.default_rng(3)
    return [(rng.integers(6, 250, n).tolist() * 3)[: 2 * n + 3] for n in (1, 5, 19)]


@pytest.mark.parametrize(
    ("layout", "params"),
    [
        pytest.param("official", GREEDY, id="official-greedy"),
        pytest.param("transformers", COUPLED, id="transformers-coupled", marks=pytest.mark.slow),
    ],
)
def test_drafts_of_any_quality_leave_the_text_as_it_is(
    loaded: dict[str, LoadedTarget], layout: str, params: SamplingParams
) -> None:
    target, other = loaded[layout].target, loaded[LAYOUTS[1 - LAYOUTS.index(layout)]].target
    params = replace(params, max_tokens=6, tree_budget=6)
    plain = Engine(target).generate(prompts(), params)
    vocab = target.info.vocab_size
    taus = []
    for draft in (target, other):  # a perfect draft, and one with other weights
        engine = Engine(target, drafter=ModelDrafter(draft, vocab_size=vocab))
        drafted = engine.generate(prompts(), replace(params, depth=3))
        assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
        taus.append(np.mean([r.stats.accepted_length for r in drafted]))
    assert taus[0] > taus[1] + 0.5


@pytest.mark.parametrize(
    # Of weights that are not quantised, test_model.py: rows_do_not_depend_on_their_company.
    "layout",
    ["official", pytest.param("transformers", marks=pytest.mark.slow)],
)
def test_a_request_alone_gives_the_text_it_gives_in_a_batch_of_sixteen(
    loaded: dict[str, LoadedTarget], layout: str
) -> None:
    target, params = loaded[layout].target, replace(GREEDY, max_tokens=4)
    many = Engine(target).generate((prompts() * 6)[:16], params)
    for prompt, result in zip(prompts(), many, strict=False):
        assert Engine(target).generate([prompt], params)[0].token_ids == result.token_ids


def test_both_layouts_of_the_same_weights_give_the_same_text(
    v4_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = v4_folders["transformers"], tmp_path / "converted"
    assert run("convert", source, dest, "--to", "official", "--weights", "keep", "-q") == 0
    capsys.readouterr()
    assert texts(source) == texts(dest)


def texts(folder: Path) -> list[list[int]]:
    engine = load_engine(folder, "none", dtype="float32", exact=False)
    return [r.token_ids for r in engine.generate(prompts(), GREEDY)]


def run(*words: object) -> int:
    import sys

    old, sys.argv = sys.argv, ["dspark", *map(str, words)]
    try:
        cli.main()
    except SystemExit as exc:
        return int(exc.code or 0)
    finally:
        sys.argv = old
    return 0


@pytest.mark.usefixtures("loaded")  # which has checked exact mode
def test_generate_with_lookup_equals_plain_decoding(
    v4_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--target", v4_folders["official"], "--raw", "--max-tokens", "14", "--json"]
    args += ["--dtype", "float32", "--exact", "--temperature", "1", "--seed", "4"]
    out = []
    for draft in ("lookup", "none"):
        assert run("generate", "abcabcabcabc", "--draft", draft, *args) == 0
        out.append(json.loads(capsys.readouterr().out))
    assert out[0]["token_ids"] == out[1]["token_ids"]
    assert len(out[0]["token_ids"]) == 14


def test_json_holds_the_reasoning_of_a_chat_answer(
    v4_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--target", v4_folders["official"], "--think", "--max-tokens", "6", "--json"]
    assert run("generate", "hi", "--no-exact", "--temperature", "0", *words) == 0
    out = json.loads(capsys.readouterr().out)
    codec = load_engine(v4_folders["official"], "none", exact=False, think=True).codec
    assert codec is not None
    expected = codec.assistant_message(out["text"], out["token_ids"])
    assert out["message"] == expected
    assert out["message"]["role"] == "assistant"
    assert out["message"]["reasoning_content"]


def test_sampling_is_at_temperature_one_by_default(v4_folders: dict[str, Path]) -> None:
    engine = load_engine(v4_folders["official"], "none", exact=False)
    assert engine.sampling_defaults == {"temperature": 1.0, "top_p": 1.0}


def test_chat_prompts_go_through_v4s_own_encoding(v4_folders: dict[str, Path]) -> None:
    ask = [{"role": "user", "content": "hi"}]
    for think, tail in ((None, "</think>"), (False, "</think>"), (True, "<think>")):
        engine = load_engine(v4_folders["official"], "none", exact=False, think=think)
        assert engine.codec is not None
        ids = engine.codec.encode_chat(ask)
        shown = "".join(engine.codec.tokenizer.convert_ids_to_tokens(ids))
        assert shown == f"<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>{tail}"


@pytest.mark.parametrize(
    ("think", "answer", "message"),
    [
        (True, "so</think>yes", {"reasoning_content": "so", "content": "yes", "tool_calls": []}),
        (True, "so and", {"reasoning_content": "so and", "content": ""}),
        (False, "yes", {"reasoning_content": "", "content": "yes", "tool_calls": []}),
        (False, "a</think>b", {"content": "shown"}),  # not the layout: as it was shown
        (False, "", {"reasoning_content": "", "content": "", "tool_calls": []}),
        (True, "", {"reasoning_content": "", "content": ""}),
    ],
)
def test_an_answer_becomes_the_message_of_the_next_turn(
    v4_folders: dict[str, Path], think: bool, answer: str, message: dict[str, object]
) -> None:
    codec = load_engine(v4_folders["official"], "none", exact=False, think=think).codec
    assert codec is not None
    ids = codec.encode_plain(answer)
    made = codec.assistant_message("shown", ids)
    assert made == {"role": "assistant", **message}
    codec.encode_chat([{"role": "user", "content": "a"}, made, {"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"effort": "huge"}, ConfigError, "effort is 'huge'"),
        ({"effort": "max", "think": False}, ConfigError, "thinking is off"),
        ({"expert_memory": "12 apples"}, ConfigError, "12 apples"),
        ({"expert_memory": 10}, ConfigError, "10"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    v4_folders: dict[str, Path],
    settings: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        load_engine(v4_folders["official"], "none", exact=False, **settings)  # type: ignore[arg-type]


def test_experts_read_from_disk_give_the_same_text(v4_folders: dict[str, Path]) -> None:
    """A budget of two experts of eight a layer: nearly every fetch is a miss."""
    folder = v4_folders["official"]
    mapped = load_engine(folder, "lookup", exact=False).generate(prompts(), GREEDY)
    paged = load_engine(folder, "lookup", exact=False, expert_memory=16_000)
    assert [r.token_ids for r in paged.generate(prompts(), GREEDY)] == [r.token_ids for r in mapped]


def test_layers_can_be_split_over_devices(v4_folders: dict[str, Path]) -> None:
    folder = v4_folders["official"]
    split = load_engine(folder, "none", exact=False, device="cpu,cpu:0")
    whole = load_engine(folder, "none", exact=False)
    assert [r.token_ids for r in split.generate(prompts(), GREEDY)] == [
        r.token_ids for r in whole.generate(prompts(), GREEDY)
    ]


def test_the_check_of_exact_mode_reaches_the_indexers_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teeth: scores that depend on how many rows ask are found, though all entries were kept.

    Without them the whole check passes: `loaded`.
    """
    honest = Indexer._scores

    def scores(self: Indexer, query: Tensor, *rest: Any) -> Tensor:
        return honest(self, query, *rest) * (-1 if len(query) == 1 else 1)

    folder = tmp_path / "m"
    one = {"num_hidden_layers": 1, "compress_ratios": (4,), "num_hash_layers": 0}
    random_checkpoint(folder, replace(SMALL, index_topk=512, **one))
    monkeypatch.setattr(Indexer, "_scores", scores)
    with pytest.raises(CapabilityError, match="does not hold"):
        load_target(folder, LoadOptions(name="v4", dtype="float32", exact=True))


def test_the_head_and_the_embedding_can_be_shared_with_a_draft(
    loaded: dict[str, LoadedTarget],
) -> None:
    assert isinstance(loaded["official"].target, SharesHead)


def test_transformers_own_class_decodes_plainly_as_a_reference(
    v4_folders: dict[str, Path],
) -> None:
    """Near-ties apart: the first tokens of a text are compared, and a draft is refused."""
    folder = v4_folders["transformers"]
    params = SamplingParams(max_tokens=4)
    engine = load_engine(f"hf:{folder}", "auto", dtype="float32")
    assert not engine.target.info.can_verify_trees
    ours = load_engine(folder, "none", dtype="float32", exact=False)
    short = [prompt[:9] for prompt in prompts()]  # before the indexer has anything to drop
    assert [r.token_ids for r in engine.generate(short, params)] == [
        r.token_ids for r in ours.generate(short, params)
    ]
    with pytest.raises(CapabilityError, match="takes no draft"):
        load_engine(f"hf:{folder}", "lookup", dtype="float32")
    with pytest.raises(CapabilityError, match="exact mode was asked for"):
        load_engine(f"hf:{folder}", "none", exact=True)


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(
    v4_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = v4_folders["official"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe_intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.0\.w1"):
        load_target(tmp_path, LoadOptions(name="x"))
