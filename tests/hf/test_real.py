"""Real weights: the accelerated SmolLM2 writes what the model itself writes."""

from __future__ import annotations

import pytest
import transformers

import dspark
from tests.hf.toys import accepted, plain
from tests.real.conftest import fetched

pytestmark = pytest.mark.real

PROMPTS = [
    "one two three, one two three, one two",
    "Copy: the red fox, the red fox, the red",
    "The capital of France is",
    "def add(a, b): return a + b\ndef add(a, b): return",
    "Once upon a time",
    "a b c d a b c d a b",
    "Monday Tuesday Wednesday Monday Tuesday",
    "2 4 6 8 10 12",
]


@pytest.mark.parametrize("rows", [1, 8])
def test_greedy_text_of_smollm2_is_that_of_the_model_itself(rows: int) -> None:
    folder = fetched("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer(PROMPTS[:rows], return_tensors="pt", padding=True)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": tokenizer.pad_token_id}
    dspark.accelerate(model, draft="lookup")
    found = model.generate(**inputs, **options)
    assert found.tolist() == plain(model, **inputs, **options).tolist()
    assert accepted(model) > 0
