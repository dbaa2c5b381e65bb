"""Exports for vLLM: its own configs, model classes and, where it has one for CPUs, its engine.

vLLM pins other versions than dspark needs, so it is in no extra: install a CPU build of it into an
environment of its own beside dspark, as docs/convert-draft.md says, and run with -m slow.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dspark
from dspark.draft.dspark import DSparkDrafter
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_format import save_eagle3
from dspark.draft.formats.convert import convert_draft
from dspark.draft.formats.programs import Program
from dspark.draft.formats.stored import read_draft
from tests.conftest import VOCAB, random_model
from tests.draft import test_eagle3 as eagle3
from tests.draft.convert_drafts import INFO, REDUCED, SHARED, lend, native, option, started
from tests.draft.dspark_models import make_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # importing it takes minutes on a slow disk
    pytest.mark.filterwarnings("ignore"),  # of what it imports
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed")

ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 2**26,
}

PLAIN = {
    "hidden_size": 64,
    "target_hidden_size": 64,
    "target_layers": (0, 1, 2),
    "intermediate_size": 96,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,  # vLLM's attention on CPUs has no narrower heads
    "vocab_size": VOCAB,
    "draft_vocab_size": VOCAB,
    "has_embedding": False,
    "max_positions": 128,
}
BIASED = {**PLAIN, "attention_bias": True, "mlp_bias": True, "norm_before_residual": True}
EAGLE3 = {
    "plain": PLAIN,
    "reduced": {**PLAIN, "draft_vocab_size": 40},
    "biased": BIASED,
    "3.1": {**PLAIN, "fc_norm": True, "norm_output": True},
    "two layers": {**PLAIN, "target_layers": (0, 2)},
    "four layers": {**PLAIN, "target_layers": (-1, 0, 1, 2), "norm_before_fc": True},
    "qwen": {**PLAIN, "qk_norm": True},
    "qwen, two layers": {**PLAIN, "qk_norm": True, "target_layers": (0, 2)},
    "narrower": {**PLAIN, "hidden_size": 32, "num_heads": 1, "has_embedding": True},
}

DFLASH = {"sample_from_anchor": False, "enable_confidence_head": False, **SHARED}
BLOCKS = {
    "dspark": ("qwen3", "vanilla", {}),
    "shared": ("qwen3", "vanilla", SHARED),
    "reduced": ("qwen3", "vanilla", {**SHARED, "vocab": REDUCED}),
    "bonus anchor": ("qwen3", "vanilla", {**SHARED, "sample_from_anchor": False}),
    "no confidence": (
        "qwen3",
        "vanilla",
        {**SHARED, "enable_confidence_head": False, "confidence_head_with_markov": False},
    ),
    "windows": ("sliding moving", "vanilla", SHARED),
    "gemma": ("gemma4", "vanilla", {}),
    "dflash": ("qwen3", "none", DFLASH),
    "dflash reduced": ("qwen3", "none", {**DFLASH, "vocab": REDUCED}),
    "dflash windows": ("sliding moving", "none", DFLASH),
}

STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
PADDED = ("embed_tokens.weight", "lm_head.weight", "markov_head.markov_w2.weight")
LENT = {"model.embed_tokens.weight", "lm_head.weight"}
UNUSED = {"model.mask_embedding"}  # of drafts that store their mask apart


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny Qwen 3 with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("target")
    random_model("qwen3", layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """The process group of one that vLLM's layers ask for."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    path = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{path}", 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
    yield
    distributed.cleanup_dist_env_and_memory()


def eagle3_draft(tmp_path, options, target, to="vllm"):
    source = tmp_path / "native"
    save_eagle3(source, eagle3.make_module(**options), layout="eagle3", num_target_layers=4)
    return converted(source, tmp_path / to, target, to)


def block_draft(tmp_path, kind, target, to="vllm", **changes):
    style, head, options = BLOCKS[kind]
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    layers = replace(make_config(style).backbone, **sizes, **changes)
    source = native(tmp_path / "native", style, head, backbone=layers, **options)
    return converted(source, tmp_path / to, target, to)


def converted(source, dest, target, to):
    made = convert_draft(source, dest, Program(to), info=INFO, lender=lend, target=str(target))
    return made.folder


def settings_of(folder, tmp_path):
    """What serve.sh hands to the server as --speculative-config."""
    arguments, _ = started(folder, tmp_path)
    return json.loads(option(arguments, "--speculative-config"))


def arguments_of(model, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), **ENGINE, **options)


def read_by_vllm(target, settings):
    """vLLM's config of a target with a draft; whether this machine can run it is not asked."""
    arguments = arguments_of(target)
    config = arguments.create_engine_config()
    arguments.speculative_config = dict(settings)
    config.speculative_config = arguments.create_speculative_config(
        config.model_config, config.parallel_config
    )
    return config


def load_by_vllm(config):
    """The draft's model as vLLM's own class and loader make it, before weights are packed."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    draft = config.speculative_config.draft_model_config
    with set_default_torch_dtype(draft.dtype):
        model = initialize_model(vllm_config=config, model_config=draft)
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(model, draft)
    return model


def layers_read(config):
    """The target's layers whose inputs vLLM hands to the draft."""
    from vllm.v1.worker.gpu.spec_decode.eagle import eagle3_utils

    return eagle3_utils.get_eagle3_aux_layers_from_config(config.speculative_config)


def stored_names(name):
    """The tensors of a checkpoint that one of vLLM's is put together from."""
    for whole, parts in STACKED.items():
        if f".{whole}." in name:
            return [name.replace(whole, part) for part in parts]
    return [name]


def check_tensors(folder, model):
    """Every stored tensor is in the model, to the bit; only the target's parts are missing."""
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("midlayer.", "layers.0.").replace("d2t", "draft_id_to_target_id")
        is_outside = name.startswith(("lm_head", "draft_id_to_target_id"))
        stored[name if is_outside else f"model.{name}"] = tensor
    stored.pop("model.t2d", None)  # it follows from d2t
    missing = set()
    parameters = dict(model.named_parameters())
    for name, held in {**dict(model.named_buffers()), **parameters}.items():
        found = [stored.pop(part) for part in stored_names(name) if part in stored]
        if not found:
            missing |= {name} & parameters.keys()
            continue
        expected = torch.cat(found) if len(found) > 1 else found[0]
        assert held.dtype == expected.dtype, name
        if name.endswith(PADDED):
            held = held[: len(expected)]
        assert torch.equal(held, expected), name
    assert not stored
    assert missing <= LENT | UNUSED


@pytest.mark.parametrize("kind", EAGLE3)
def test_vllm_reads_an_eagle3_draft(tmp_path, target, group, kind):
    folder = eagle3_draft(tmp_path, EAGLE3[kind], target)
    config = read_by_vllm(target, settings_of(folder, tmp_path))
    assert config.speculative_config.method == "eagle3"
    assert config.speculative_config.num_speculative_tokens == 5
    mine = read_draft(folder, INFO).config
    assert layers_read(config) == tuple(layer + 1 for layer in mine.target_layers)
    model = load_by_vllm(config)
    kind = "Eagle3Qwen3ForCausalLM" if mine.qk_norm else "Eagle3LlamaForCausalLM"
    assert type(model).__name__ == kind
    check_tensors(folder, model)
    assert model.model.norm_output == mine.norm_output
    assert model.model.norm_before_fc == mine.norm_before_fc
    layer = model.model.layers[0]
    is_before = layer._residual_norm == layer._norm_before_residual
    assert is_before == mine.norm_before_residual


@pytest.mark.parametrize("kind", BLOCKS)
def test_vllm_reads_a_block(tmp_path, monkeypatch, target, group, kind):
    folder = block_draft(tmp_path, kind, target)
    config = read_by_vllm(target, settings_of(folder, tmp_path))
    mine = read_draft(folder, INFO).config
    speculative = config.speculative_config
    assert speculative.method == ("dspark" if mine.markov_rank else "dflash")
    assert speculative.num_speculative_tokens == mine.gamma
    assert layers_read(config) == tuple(layer + 1 for layer in mine.target_layer_ids)
    # Layers with and without a window in one draft are its newer runner's.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    model = load_by_vllm(config)
    check_tensors(folder, model)
    layers = [layer.self_attn for layer in model.model.layers]
    windows = mine.backbone.windows
    assert [layer.causal for layer in layers] == [window is not None for window in windows]
    if kind != "gemma":
        sizes = [None if window is None else window.size for window in windows]
        assert [layer.sliding_window for layer in layers] == sizes
        assert model.model.mask_token_id == mine.mask_token_id
    if mine.markov_rank:
        fields = speculative.draft_model_config.hf_config
        assert fields.block_size == mine.block_size
        assert fields.sample_from_anchor == mine.sample_from_anchor
        has_head = model.model.confidence_head is not None
        assert has_head == mine.enable_confidence_head


@pytest.mark.parametrize("is_anchor", [True, False])
def test_vllm_reads_the_anchor_in_speculators_layout(tmp_path, target, is_anchor):
    source = native(tmp_path / "a", "qwen3", "vanilla", **SHARED, sample_from_anchor=is_anchor)
    folder = converted(source, tmp_path / "b", target, "speculators")
    count = 5 if is_anchor else 4
    settings = {"method": "dspark", "model": str(folder), "num_speculative_tokens": count}
    draft = read_by_vllm(target, settings).speculative_config.draft_model_config
    assert draft.hf_config.sample_from_anchor is is_anchor
    assert draft.hf_config.dspark_bonus_anchor is not is_anchor


def test_vllm_serves_the_verifier_of_speculators_layout(tmp_path, target):
    folder = eagle3_draft(tmp_path, PLAIN, target, "speculators")
    config = arguments_of(folder).create_engine_config()
    assert config.model_config.model == str(target)
    assert config.speculative_config.method == "eagle3"
    assert layers_read(config) == (1, 2, 3)


def test_vllm_runs_dspark_with_triton_alone(tmp_path, target):
    """Documented: if this fails, docs/convert-draft.md and docs/scale.md are wrong."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        pytest.skip("Triton is installed")
    settings = settings_of(block_draft(tmp_path, "shared", target), tmp_path)
    with pytest.raises(ValueError, match="does not support: dspark speculative decoding"):
        arguments_of(target, speculative_config=settings).create_engine_config()


PROMPTS = [[5, 9, 3, 11, 40, 7], [81, 2, 60, 33]]
LENGTH = 24


def drafts_of_vllm(monkeypatch, target, settings):
    """Texts of vLLM's engine and the chains that it drafted, by prompt."""
    import vllm
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    drafted = []
    propose = SpecDecodeBaseProposer.propose

    def record(self, *args, **options):
        made = propose(self, *args, **options)
        drafted.append(made[0].tolist())
        return made

    monkeypatch.setattr(SpecDecodeBaseProposer, "propose", record)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # it replaces it
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = vllm.LLM(str(target), **ENGINE, speculative_config=settings, enable_prefix_caching=False)
    params = vllm.SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    params.detokenize = False
    texts, chains = [], []
    for prompt in PROMPTS:
        drafted.clear()
        (result,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        texts.append(list(result.outputs[0].token_ids))
        chains.append(list(drafted))
    llm.llm_engine.engine_core.shutdown()
    return texts, chains


def drafts_of_dspark(monkeypatch, target, folder, length):
    """The same of dspark's engine."""
    engine = dspark.Engine.load(
        target=target, draft=folder, config=dspark.EngineConfig(auto_off=False)
    )
    drafted = []
    drafter = type(engine.drafter)
    assert drafter in (Eagle3Drafter, DSparkDrafter)
    propose = drafter.propose

    def record(self, contexts):
        made = propose(self, contexts)
        drafted.append(made[0].tree.token.tolist())
        return made

    monkeypatch.setattr(drafter, "propose", record)
    params = dspark.SamplingParams(
        max_tokens=LENGTH, ignore_eos=True, width=1, depth=length, tree_budget=length
    )
    texts, chains = [], []
    for prompt in PROMPTS:
        drafted.clear()
        texts.append(engine.generate([prompt], params)[0].token_ids)
        chains.append(list(drafted))
    return texts, chains


@pytest.mark.parametrize("kind", ["eagle3", "eagle3 reduced", "dflash"])
def test_vllms_engine_drafts_what_dspark_drafts(tmp_path, monkeypatch, target, kind):
    """Token by token: the layers, the masks and the vocabulary are read as they are meant."""
    if kind == "dflash":
        folder = block_draft(tmp_path, "dflash", target, windows=(None,))  # see the test below
    else:
        options = EAGLE3["reduced" if "reduced" in kind else "plain"]
        folder = eagle3_draft(tmp_path, options, target)
    settings = settings_of(folder, tmp_path)
    length = settings["num_speculative_tokens"]
    texts, chains = drafts_of_vllm(monkeypatch, target, settings)
    mine, my_chains = drafts_of_dspark(monkeypatch, target, folder, length)
    assert texts == mine
    compared = 0
    for theirs, ours in zip(chains, my_chains, strict=True):
        for chain, my_chain in zip(theirs, ours, strict=False):  # one may draft behind the end
            assert chain[: len(my_chain)] == my_chain
            compared += len(my_chain)
    assert compared > 2 * LENGTH


def test_vllm_norms_context_keys_by_the_first_layer_on_cpus():
    """Documented: if this fails, vLLM has mended it, and docs/convert-draft.md is wrong.

    DFlash and DSpark norm the context's keys of all layers in one call, with one row of weights a
    layer; the kernel for CPUs takes the first row for all of them.
    """
    from vllm import _custom_ops

    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 1, 32, generator=generator)
    weights = 1 + 0.2 * torch.randn(2, 32, generator=generator)
    normed = torch.empty_like(keys)
    _custom_ops.rms_norm(normed, keys, weights, 1e-6)
    plain = keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.allclose(normed[0], plain[0] * weights[0], atol=1e-5)
    assert torch.allclose(normed[1], plain[1] * weights[0], atol=1e-5)
