"""From options to configurations and prompts, and what a log's key holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import dspark
from dspark.errors import ConfigError, DataError
from dspark.eval.bench import Contestant
from dspark.eval.bench_setup import (
    Servers,
    Setup,
    bench_key,
    bench_requests,
    other_contestants,
    own_contestants,
    server_contestants,
)
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.results import RunFacts, build_header
from dspark.eval.runner import question_seed
from dspark.request import SamplingParams
from tests.conftest import random_model, random_target
from tests.eval.fake_server import serving
from tests.eval.test_runner import TEMPLATE, codec

PROMPTS = PromptSet(
    name="tiny",
    questions=(
        Question(question_id=1, category="one", turns=("abc", "again")),
        Question(question_id="two", category="two", turns=("xyz",)),
    ),
)
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


def engine_of(template: str | None = TEMPLATE) -> dspark.Engine:
    return dspark.Engine(random_target(layers=2, exact=True), codec=codec(template))


def setup_of(**more: object) -> Setup:
    engine = engine_of()
    fields = {
        "engine": engine,
        "target": "smollm2-135m",
        "dtype": "float32",
        "device": "cpu",
        "params": PARAMS,
        "requests": bench_requests(engine, PROMPTS, seed=3, is_raw=False),
        **more,
    }
    return Setup(**fields)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder, where a draft is looked for."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_model("llama", layers=1).save_pretrained(folder)
    return str(folder)


def names(found: list[Contestant]) -> list[str]:
    return [contestant.name for contestant in found]


def test_prompts_are_first_turns_as_the_target_reads_them() -> None:
    engine = engine_of()
    first, second = bench_requests(engine, PROMPTS, seed=3, is_raw=False)
    chat = engine.codec.encode_chat([{"role": "user", "content": "abc"}])
    assert (first.text, first.token_ids) == ("abc", tuple(chat))
    assert second.seed == question_seed(3, "two")
    raw, _ = bench_requests(engine, PROMPTS, seed=3, is_raw=True)
    assert raw.token_ids == tuple(engine.codec.encode("abc"))


def test_a_prompt_that_cannot_be_encoded_is_named() -> None:
    refusing = "{{ raise_exception('not this one') if 'z' in messages[0].content }}x"
    with pytest.raises(DataError, match="question two: the chat template refuses"):
        bench_requests(engine_of(refusing), PROMPTS, seed=0, is_raw=False)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        bench_requests(
            dspark.Engine(random_target(layers=2, exact=True)), PROMPTS, seed=0, is_raw=True
        )


def test_plain_decoding_has_one_shape_and_a_draft_has_all(tiny: str) -> None:
    found = own_contestants(
        setup_of(target=tiny), ["none", "lookup"], widths=(1, 4), budgets=(7,), loaded="none"
    )
    assert names(found) == ["none", "lookup width 1 budget 7", "lookup width 4 budget 7"]
    assert [(c.params.width, c.params.tree_budget) for c in found[1:]] == [(1, 7), (4, 7)]
    assert names(own_contestants(setup_of(target=tiny), ["lookup"], loaded=None)) == ["lookup"]


def test_other_programs_are_named_by_their_files_only_where_needed(tmp_path: Path) -> None:
    files = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for file in files:
        file.write_bytes(file.name.encode())
    found = other_contestants(setup_of(), ["transformers", f"llama.cpp={files[0]}"])
    assert names(found) == ["transformers", "llama.cpp"]
    specs = [f"llama.cpp={file}" for file in files] + [f"llama.cpp:lookup={files[0]}"]
    found = other_contestants(setup_of(), specs)
    assert names(found) == ["llama.cpp=one.gguf", "llama.cpp=two.gguf", "llama.cpp:lookup"]
    assert found[0].identity != found[1].identity
    assert str(tmp_path) not in repr([(c.facts, c.identity, c.runner.notes) for c in found])


def test_a_server_without_a_name_is_named_by_its_address() -> None:
    with serving() as fake:
        address = fake.url.removeprefix("http://").removesuffix("/v1")
        found = server_contestants(setup_of(), Servers(urls=[fake.url, f"mine={fake.url}"]))
        (asked,) = server_contestants(setup_of(), Servers(urls=[fake.url], model="other"))
    assert names(found) == [address, "mine"]
    assert (found[0].identity["model"], asked.identity["model"]) == ("the-model", "other")


def test_the_key_holds_what_decides_a_measurement_and_nothing_else(tiny: str) -> None:
    def key(setup: Setup, drafts: tuple[str, ...] = ("none", "lookup"), **facts: object) -> str:
        contestants = own_contestants(setup, drafts, loaded="none")
        given = {"target": "t", "template": "chat", "seed": 3, "prompts": (PROMPTS,), **facts}
        header = build_header(setup.engine, RunFacts(**given))
        return bench_key({**header, "concurrencies": [1]}, contestants)

    setup = setup_of(target=tiny)
    same = key(setup)
    assert key(setup_of(target=tiny)) == same
    assert key(setup, repeats=7) == same
    others = [
        key(setup, ("none",)),  # what was interleaved is not comparable with what was not
        key(setup, seed=4),
        key(setup, warm_ups=2),
        key(setup, template="raw"),
        key(setup, prompts=(PROMPTS.select(1),)),
        key(replace(setup, auto_off=False)),
        key(replace(setup, params=replace(PARAMS, max_tokens=11))),
    ]
    assert len({same, *others}) == 1 + len(others)
