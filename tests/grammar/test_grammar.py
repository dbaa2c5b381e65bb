"""Grammars by llguidance: masks, answers that fit their schema, messages."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import dspark
from dspark.draft.lookup import LookupDrafter
from dspark.errors import CapabilityError, ConfigError
from dspark.grammar import Grammar, Whitespace
from dspark.grammar.tokens import table_of
from dspark.request import FinishReason, SamplingParams
from dspark.verify.constraint import Constraint, ConstraintState, PathMasks
from tests.grammar.toys import BigramTarget, toy_codec

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["alpha", "alphabet", "beta"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value fits a schema of the kind that `schema_of` makes."""
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "object":
        own = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(own)
            and list(value) == [name for name in own if name in value]
            and all(conforms(item, own[name]) for name, item in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(conforms(item, schema["items"]) for item in value)
        )
    if kind == "string":
        fits = isinstance(value, str) and len(value) <= schema["maxLength"]
        return fits and re.search(schema.get("pattern", ""), value) is not None
    if kind == "integer":
        return is_number and value == int(value) and schema["minimum"] <= value <= schema["maximum"]
    return {"number": is_number, "boolean": isinstance(value, bool), "null": value is None}[kind]


def schema_of(rng: np.random.Generator, depth: int = 2) -> dict[str, Any]:
    """A random schema whose texts are short."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum"]
    kind = rng.choice([*kinds, "object", "object", "array", "anyOf"] if depth else kinds)
    if kind == "object":
        names = ["name", "age", "orderId", "orderName", "é\n", 'a"b', ""]
        own = {str(n): schema_of(rng, depth - 1) for n in rng.permutation(names)[: rng.integers(4)]}
        required = [name for name in own if rng.random() < 0.6]
        shape = {"type": "object", "properties": own, "required": required}
        return {**shape, "additionalProperties": False}
    if kind == "array":
        least = int(rng.integers(3))
        counts = {"minItems": least, "maxItems": least + int(rng.integers(3))}
        return {"type": "array", "items": schema_of(rng, depth - 1), **counts}
    if kind == "anyOf":
        return {"anyOf": [schema_of(rng, depth - 1) for _ in range(1 + rng.integers(3))]}
    if kind == "enum":
        values = [1, "alpha", "alphabet", "beta gamma", None, 2.5, True]
        return {"enum": [values[i] for i in rng.permutation(len(values))[: 1 + rng.integers(4)]]}
    if kind == "pattern":
        return {"type": "string", "maxLength": 20, "pattern": "^[a-c]{2,4}-[0-9]{1,3}(x|yz)?$"}
    if kind == "integer":
        low = int(rng.integers(-50, 50))
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(1, 2000))}
    limit = {"maxLength": int(rng.integers(1, 9))} if kind == "string" else {}
    return {"type": str(kind), **limit}


@pytest.mark.parametrize("seeds", [(0, 1), pytest.param((2, 3), marks=pytest.mark.slow)])
def test_100_random_schemas_give_texts_that_fit(seeds: tuple[int, ...]) -> None:
    """Random models, rules, temperatures and whitespace; drafted as well as plain."""
    rng = np.random.default_rng(1 + seeds[0])
    rules = ["auto", "auto", "sample-match", "rejection", "block"]
    finished = 0
    for seed in seeds:
        schemas = [schema_of(rng) for _ in range(50)]
        params = []
        for i, schema in enumerate(schemas):
            space = list(Whitespace)[i % 3]
            rule = rules[i % 5]
            own = {"temperature": 0.0 if i % 5 == 0 else 0.7, "seed": i, "rule": rule}
            grammar = Grammar.json_schema(schema, toy_codec(), whitespace=space)
            params.append(SamplingParams(max_tokens=120, grammar=grammar, **own))
        target = BigramTarget(seed)
        config = dspark.EngineConfig(max_batch=16, auto_off=False)
        engine = dspark.Engine(target, drafter=LookupDrafter(), codec=toy_codec(), config=config)
        prompts = ['{"name": "Anna", "age": 31}'] * len(schemas)
        results = engine.generate(prompts, params)
        for schema, result in zip(schemas, results, strict=True):
            assert result.error is None
            if result.finish_reason is FinishReason.STOP:
                finished += 1
                assert conforms(json.loads(result.text), schema), (schema, result.text)
        assert sum(result.stats.accepted for result in results) > 50
        if seed == 0:
            same = [i for i in range(50) if rules[i % 5] not in ("rejection", "block")]
            plain = engine.generate(
                [prompts[0]] * len(same), [replace(params[i], draft=False) for i in same]
            )
            assert [results[i].token_ids for i in same] == [one.token_ids for one in plain]
    assert finished > 75


def walk(grammar: Grammar, rng: np.random.Generator, steps: int) -> list[int]:
    """Tokens of a random text, as far as it goes."""
    state, text = grammar.start(), []
    for _ in range(steps):
        mask = state.allowed([])
        mask[list(grammar.end_tokens)] = False
        if not mask.any():
            break
        text.append(int(rng.choice(np.flatnonzero(mask))))
        state.advance(text[-1])
    return text


GRAMMARS = {
    "free": lambda: Grammar.json_schema(PERSON, toy_codec()),
    "spaced": lambda: Grammar.json_schema(PERSON, toy_codec(), whitespace="spaced"),
    "any object": lambda: Grammar.json_object(toy_codec(), whitespace="compact"),
    "regex": lambda: Grammar.regex(r"(\d{3}-){2}\d{4} (foo|foobar)+é{1,20}\.", toy_codec()),
    "lark": lambda: Grammar.lark(
        'start: item ("," item)*\nitem: "n" | "name" | "[" start "]"', toy_codec()
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_mask_depends_on_the_tokens_alone(name: str) -> None:
    """Not on the paths that were looked at before, nor on how many tokens came at a time."""
    grammar, rng = GRAMMARS[name](), np.random.default_rng(3)
    for _ in range(6):
        text = walk(grammar, rng, 25)
        masks, state = [], grammar.start()
        for token in text:
            masks.append(state.allowed([]))
            state.advance(token)
        wandering = grammar.start()
        for at in rng.permutation(len(text)).tolist():
            walk_from(wandering, text[:at], grammar, rng)
            assert np.array_equal(wandering.allowed(text[:at]), masks[at])
        done = 0
        while done < len(text):
            path = text[done : done + 4]
            walk_from(wandering, path[:2], grammar, rng)
            for size in reversed(range(len(path))):
                assert np.array_equal(wandering.allowed(path[:size]), masks[done + size])
            for token in path[:2]:
                wandering.advance(token)
            done += 2


def walk_from(
    state: ConstraintState, path: list[int], grammar: Grammar, rng: np.random.Generator
) -> None:
    """Look at some paths that leave a path, as drafted trees do."""
    added: list[int] = []
    for _ in range(3):
        mask = state.allowed([*path, *added]).copy()
        mask[list(grammar.end_tokens)] = False
        if not mask.any():
            break
        added.append(int(rng.choice(np.flatnonzero(mask))))


def test_a_grammar_is_a_constraint() -> None:
    grammar = Grammar.regex("a", toy_codec())
    assert isinstance(grammar, Constraint)
    assert isinstance(grammar.start(), ConstraintState)
    assert copy.deepcopy(SamplingParams(grammar=grammar)).grammar is grammar
    assert table_of(toy_codec()) is table_of(toy_codec())


def test_forced_tokens_are_the_only_ones_allowed() -> None:
    codec = toy_codec()
    grammar = Grammar.json_schema(PERSON, codec, whitespace="compact")
    ends = frozenset({codec.vocabulary()["<turn>"]})
    masks = PathMasks(grammar, vocab_size=grammar.vocab_size + 3, end_tokens=ends)
    forced = masks.forced(50)
    assert len(forced) > 2
    assert '{"name":"'.startswith(codec.decode(forced))
    for size in range(len(forced)):
        assert np.flatnonzero(masks.allowed(forced[:size])).tolist() == [forced[size]]
    assert masks.allowed(forced).sum() > 1
    assert masks.forced(2) == forced[:2]
    # Behind a token that is not allowed there is nothing to say.
    assert masks.allowed([codec.encode_plain("x")[0]]) is None


def test_only_whitespace_of_some_length_is_allowed() -> None:
    codec, size = toy_codec(), None
    blank = codec.encode_plain(" ")[0]
    for space, most in (("free", 32), ("spaced", 0), ("compact", 0)):
        state = Grammar.json_schema(PERSON, codec, whitespace=space).start()
        (brace,) = codec.encode_plain("{")
        if not state.allowed([])[brace]:  # '{"' is one token, and forced
            continue
        state.advance(brace)
        size = 0
        while state.allowed([])[blank]:
            state.advance(blank)
            size += 1
        assert size == most
    assert size is not None


def test_text_may_not_hold_special_tokens() -> None:
    codec = toy_codec()
    state = Grammar.json_schema({"type": "string"}, codec).start()
    for token in codec.encode_plain('"Anna'):
        state.advance(token)
    mask = state.allowed([])
    assert mask.sum() > 100
    assert not mask[[codec.vocabulary()[name] for name in ("<end>", "<turn>")]].any()


def test_a_tokenizer_without_the_characters_is_a_dead_end() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dspark.text import TextCodec

    own = Tokenizer(models.BPE(vocab={"<e>": 0, "a": 1, "b": 2, "c": 3}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(["<e>"])
    names = {"eos_token": "<e>"}
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=own, **names))
    for pattern in ("azc", "a(z|y)"):
        state = Grammar.regex(pattern, codec).start()
        state.advance(1)
        assert not state.allowed([]).any()
        assert not state.allowed([]).any()
    state = Grammar.regex("(ab|az)c?", codec).start()
    state.advance(1)
    assert np.flatnonzero(state.allowed([])).tolist() == [2]
    assert np.flatnonzero(state.allowed([2])).tolist() == [0, 3]
    assert np.flatnonzero(state.allowed([2, 3])).tolist() == [0]


REFUSED = {
    "not": lambda codec: Grammar.json_schema({"not": {"type": "string"}}, codec),
    "uniqueItems": lambda codec: Grammar.json_schema(
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, codec
    ),
    "strin": lambda codec: Grammar.json_schema('{"type": "strin"}', codec),
    "schema": lambda codec: Grammar.json_schema("[1]", codec),
    "EOF": lambda codec: Grammar.json_schema('{"type', codec),
    "set": lambda codec: Grammar.json_schema({"enum": {1}}, codec),
    "look-around": lambda codec: Grammar.json_schema(
        {"type": "string", "pattern": "(?=a)b"}, codec
    ),
    "http": lambda codec: Grammar.json_schema({"$ref": "http://example.org/a"}, codec),
    "Unsatisfiable": lambda codec: Grammar.json_schema(
        {"allOf": [{"type": "string"}, {"type": "null"}]}, codec
    ),
    "unclosed group": lambda codec: Grammar.regex("a(b", codec),
    "foo": lambda codec: Grammar.lark("start: foo", codec),
    "whitespace is 'wide'": lambda codec: Grammar.json_object(codec, whitespace="wide"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_says_what_it_is_about(what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        REFUSED[what](toy_codec())
    assert what in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_grammar_behind_a_models_reasoning() -> None:
    codec = toy_codec()
    grammar = Grammar.regex("a+", codec)
    state = grammar.after("<turn>").start()
    turn, letter = codec.vocabulary()["<turn>"], codec.vocabulary()["a"]
    end = codec.vocabulary()["<end>"]
    assert np.flatnonzero(~state.allowed([])).tolist() == [end]
    behind = grammar.start().allowed([])
    assert np.array_equal(state.allowed([letter + 1, turn]), behind)
    for token in (letter + 1, letter, turn):
        state.advance(token)
    assert np.array_equal(state.allowed([]), behind)
    state.advance(letter)
    assert state.allowed([])[[letter, end]].all()
    with pytest.raises(ConfigError, match="no such token"):
        grammar.after("</thought>")


def test_no_tokenizer_no_grammar() -> None:
    with pytest.raises(CapabilityError, match="no tokenizer"):
        Grammar.regex("a", None)


def test_the_library_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="llguidance") as caught:
        Grammar.regex("a", toy_codec())
    assert "dspark[grammar]" in caught.value.hint
