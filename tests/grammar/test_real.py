"""A real model under a JSON schema: a valid answer, the same with and without a draft."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import dspark
from dspark.draft.lookup import LookupDrafter
from dspark.grammar import Grammar
from dspark.request import FinishReason, SamplingParams
from dspark.text import load_codec
from tests.real.conftest import exact_target, fetched

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

NAME = "smollm2-135m"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}


def test_a_schemas_answer_fits_it_and_no_draft_changes_it() -> None:
    target = exact_target(NAME, "float32").target
    codec = load_codec(fetched(NAME))
    grammar = Grammar.json_schema(PERSON, codec, whitespace="spaced")
    params = SamplingParams(max_tokens=60, grammar=grammar)
    prompt = [{"role": "user", "content": "Anna is 30. Describe her as JSON."}]
    drafted, forced_only = (
        dspark.Engine(target, codec=codec, drafter=drafter).generate([prompt], params)[0]
        for drafter in (LookupDrafter(), None)
    )
    (plain,) = dspark.Engine(target, codec=codec).generate([prompt], replace(params, draft=False))
    assert plain.finish_reason is FinishReason.STOP
    answer = json.loads(plain.text)
    assert list(answer) == ["name", "age", "hobbies"]
    assert isinstance(answer["name"], str)
    assert 0 <= answer["age"] <= 120
    assert drafted.token_ids == forced_only.token_ids == plain.token_ids
    assert forced_only.stats.forced > 5
    assert forced_only.stats.rounds == plain.stats.rounds - forced_only.stats.forced
    assert drafted.stats.rounds <= forced_only.stats.rounds
