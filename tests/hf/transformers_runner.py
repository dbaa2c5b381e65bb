"""Runs transformers' own generation tests with and without `dspark.accelerate`; prints JSON lines.

    python transformers_runner.py CHECKOUT FAMILY

A program of its own, because transformers' tests are a package named `tests`, as these are.
CHECKOUT holds that package. FAMILY is llama, qwen3 or gemma3, or `tools`: the tests of streamers,
stopping criteria and of whole calls, which are written for small models from the hub. There every
causal model is a tiny Llama, and the tokenizer one of bytes.

Every test runs twice: as it is, and with `GenerationMixin.generate` replaced by one that
accelerates the model at its first call. A line says how often dspark decoded and how often the
model's own generate did, with the reasons. Tests that do not pass as they are say nothing here.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import unittest
import warnings
from unittest import mock

CHECKOUT, FAMILY = sys.argv[1:]
sys.path[0] = CHECKOUT
ROWS, sys.stdout = sys.stdout, sys.stderr  # tests print

import torch  # noqa: E402
import transformers  # noqa: E402

import dspark  # noqa: E402

CLASSES = {
    "llama": "LlamaModelTest",
    "qwen3": "Qwen3ModelTest",
    "gemma3": "Gemma3TextModelTest",
}
TOOLS = {
    "test_streamers": "StreamerTester",
    "test_stopping_criteria": "StoppingCriteriaTestCase",
    "test_utils": "GenerationIntegrationTests",
}
# Kernels and devices that are not here, compilation, and what calls no generate at all.
LEFT_OUT = (
    "flash_attention", "_fa2_", "_fa3_", "_fa4_", "compil", "accelerator", "model_parallel",
    "padding_free", "4d_attention", "forward_with_logits", "prepare_inputs", "inherits",
    "quant_cache", "offload",
)  # fmt: skip
STOCK = transformers.GenerationMixin.generate


class Counts:
    """What became of the calls of one test."""

    def __init__(self) -> None:
        self.accelerated = 0
        self.stock = 0
        self.models: list[object] = []

    def replacement(self):
        @functools.wraps(STOCK)  # whose signature is read, by transformers too
        def generate(model, *args, **kwargs):
            return self.generate(model, *args, **kwargs)

        return generate

    def generate(self, model, *args, **kwargs):
        if not any(model is known for known in self.models):
            self.models.append(model)
            try:
                dspark.accelerate(model, draft="lookup")
            except dspark.ConfigError:
                return STOCK(model, *args, **kwargs)
            return model.generate(*args, **kwargs)
        method = kwargs.get("custom_generate")
        out = STOCK(model, *args, **kwargs)
        if getattr(method, "__module__", "") == "dspark.hf.accelerated":
            self.accelerated += 1
        else:
            self.stock += 1
        return out


class Bytes:
    """A tokenizer of bytes for a vocabulary of 259; made once."""

    made = None

    @classmethod
    def tokenizer(cls, *args, **kwargs):
        if cls.made is None:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers

            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            special = ["<pad>", "<s>", "</s>"]
            ids = {token: i for i, token in enumerate([*special, *alphabet])}
            made = Tokenizer(models.BPE(vocab=ids, merges=[]))
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            cls.made = transformers.PreTrainedTokenizerFast(
                tokenizer_object=made,
                **dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True)),
            )
        return cls.made


def tiny_llama(*args, **kwargs):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def without_holes(prepare):
    """Their inputs with a mask of ones: their own masks hide tokens in the middle."""

    @functools.wraps(prepare)
    def prepared(*args, **kwargs):
        config, inputs = prepare(*args, **kwargs)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return config, inputs

    return prepared


def chosen():
    """(class, name) of every test to run."""
    if FAMILY in CLASSES:
        module = importlib.import_module(f"tests.models.{FAMILY}.test_modeling_{FAMILY}")
        mixin = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
        classes = [getattr(module, CLASSES[FAMILY])]
        mixin.prepare_config_and_inputs_for_generate = without_holes(
            mixin.prepare_config_and_inputs_for_generate
        )
        names = {name for name in dir(mixin) if name.startswith("test_")}
    else:
        modules = {name: importlib.import_module(f"tests.generation.{name}") for name in TOOLS}
        classes = [getattr(modules[name], TOOLS[name]) for name in TOOLS]
        names = None
    for case in classes:
        for name in unittest.defaultTestLoader.getTestCaseNames(case):
            is_wanted = names is None or any(name == n or name.startswith(f"{n}_") for n in names)
            if is_wanted and not any(part in name for part in LEFT_OUT):
                yield case, name


def run(case, name):
    """None if it passed, else the last line of what it said."""
    result = unittest.TestResult()
    torch.manual_seed(0)
    sys.modules["tests.test_modeling_common"].global_rng.seed(0)
    case(name).run(result)
    if result.skipped:
        return f"skipped: {result.skipped[0][1]}"
    for _, text in [*result.errors, *result.failures]:
        return text.strip().splitlines()[-1]
    return None


def main() -> None:
    patches = []
    if FAMILY == "tools":
        for name in ("AutoModelForCausalLM", "AutoTokenizer"):
            made = tiny_llama if name.startswith("AutoModel") else Bytes.tokenizer
            patches.append(mock.patch.object(getattr(transformers, name), "from_pretrained", made))
    for patch in patches:
        patch.start()
    for case, name in chosen():
        said = run(case, name)
        row = {"test": f"{case.__name__}.{name}", "stock": said}
        if said is None:
            counts = Counts()
            replaced = mock.patch.object(
                transformers.GenerationMixin, "generate", counts.replacement()
            )
            with warnings.catch_warnings(record=True) as caught, replaced:
                warnings.simplefilter("always", dspark.hf.FallbackWarning)
                row["with_dspark"] = run(case, name)
            row["accelerated"], row["fell_back"] = counts.accelerated, counts.stock
            mine = [w for w in caught if isinstance(w.message, dspark.hf.FallbackWarning)]
            row["reasons"] = sorted({str(w.message).partition("because of ")[2] for w in mine})
        ROWS.write(json.dumps(row) + "\n")
        ROWS.flush()


main()
