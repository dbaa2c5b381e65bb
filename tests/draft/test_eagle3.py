"""The EAGLE-3 drafter: against a plain reference, its files, and behind the engine."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark
from dspark.draft.base import Drafter, Observer
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_format import is_eagle3, load_eagle3, save_eagle3
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.grow import GrowthConfig
from dspark.errors import CapabilityError, CheckpointError, ConfigError, DsparkError, ShapeError
from dspark.request import Rule, SamplingParams
from dspark.target import TargetInfo
from tests.conftest import VOCAB, random_target
from tests.draft.reference_eagle3 import Reference
from tests.draft.test_model import naive_ranked, paths_of, shaped_row, softmax

E = 12  # width of the target's hidden states
SMALL = {
    "hidden_size": 12,
    "target_hidden_size": E,
    "target_layers": (3, 0, 1),  # in no order: fc reads them as listed
    "intermediate_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "vocab_size": 23,
    "draft_vocab_size": 9,
    "has_embedding": True,
    "max_positions": 64,
}
FULL = {**SMALL, "draft_vocab_size": 23}
QWEN = {**FULL, "qk_norm": True}
GEMMA = {
    **QWEN,
    "v_norm": True,
    "key_is_value": True,
    "sandwich_norms": True,
    "layer_scalar": True,
    "attention_scale": 1.0,
    "embed_scale": 12**0.5,
    "logit_softcap": 3.0,
    "activation": "gelu_pytorch_tanh",
}
KINDS = {
    "llama": {**SMALL, "has_embedding": False},
    "biased": {**SMALL, "attention_bias": True, "mlp_bias": True, "norm_before_residual": True},
    "qwen": QWEN,
    "gemma": GEMMA,
    "3.1": {**SMALL, "fc_norm": True, "norm_output": True},
    "input norm": {**SMALL, "norm_before_fc": True, "target_layers": (2, 3, 0, 1, -1)},
}
TABLE = torch.randn(23, 12, generator=torch.Generator().manual_seed(1))


def lend(ids):
    return TABLE[ids]


def make_module(seed=0, **options):
    torch.manual_seed(seed)
    module = Eagle3Module(Eagle3Config(**options)).requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if name == "d2t":
            ids = torch.randperm(options["vocab_size"])[: len(tensor)].sort().values
            tensor.copy_(ids - torch.arange(len(ids)))
        elif tensor.dim() > 1:
            tensor.normal_(std=0.4)
        else:
            tensor.normal_(mean=1.0, std=0.2)
    return module


@functools.cache
def hidden_at(request, position, layer):
    rng = np.random.default_rng([request, position, layer + 1])
    return torch.from_numpy(rng.standard_normal(E).astype(np.float32))


def features(module, request, start, stop):
    layers = module.config.target_layers
    rows = range(start, stop)
    return {k: torch.stack([hidden_at(request, p, k) for p in rows]) for k in layers}


def drafter_of(module, **config):
    config = GrowthConfig(**config)
    return Eagle3Drafter(module, embed=lend, config=config)


class Oracle:
    """Speaks to the naive trees of test_model.py as their toy target does."""

    def __init__(self, module, context):
        lent = None if module.config.has_embedding else lend
        self.reference = Reference(module.config, module.state_dict(), lent)
        self.size = len(context.tokens)
        self.hidden = features(module, context.request_id, 0, self.size - 1)
        self.known = {}

    def logits(self, tokens):
        path = tuple(tokens[self.size :])
        if path not in self.known:
            row = self.reference.logits(tokens[: self.size], self.hidden, path)
            self.known[path] = row.float().numpy()
        return self.known[path]


def text(request, size):
    return np.random.default_rng([9, request]).integers(0, 23, size).tolist()


def record_logits(drafter):
    """Every row of logits that a tree gets: {path: row}."""
    seen, feed = {}, drafter._feed

    def watch(job, logits):
        for node, row in zip(job.frontier, drafter._vocab.widen(logits.float()), strict=True):
            path = () if node < 0 else tuple(job.growth.tree.path_tokens(node))
            seen[job.context.request_id, path] = row
        feed(job, logits)

    drafter._feed = watch
    return seen


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *((kind, Rule.GREEDY) for kind in KINDS),
        ("llama", Rule.COUPLED),
        ("biased", Rule.SAMPLE_MATCH),
        pytest.param("llama", Rule.SAMPLE_MATCH, marks=pytest.mark.slow),
        pytest.param("biased", Rule.COUPLED, marks=pytest.mark.slow),
    ],
)
def test_trees_and_logits_are_those_of_the_reference(make_context, kind, rule):
    module = make_module(**KINDS[kind])
    drafter = drafter_of(module, beams=3)
    seen = record_logits(drafter)
    contexts = [
        make_context(text(i, size), request_id=i, rule=rule, budget=7, depth=3, width=3)
        for i, size in enumerate((2, 6, 11))
    ]
    for context in contexts:
        context.features = features(module, context.request_id, 0, len(context.tokens) - 1)
    for context, proposal in zip(contexts, drafter.propose(contexts), strict=True):
        proposal.validate()
        oracle = Oracle(module, context)
        expected = naive_ranked(oracle, context, GrowthConfig(beams=3))
        assert set(paths_of(proposal.tree)) == set(expected)
        for path, worth in zip(paths_of(proposal.tree), proposal.tree.survival, strict=True):
            assert worth == pytest.approx(expected[path], rel=1e-3)
        rows = {path: row for (i, path), row in seen.items() if i == context.request_id}
        assert len(rows) > 2
        for path, row in rows.items():
            want = torch.from_numpy(oracle.logits([*context.tokens, *path]))
            torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_drawn_children_come_with_the_laws_of_the_reference(make_context, rule):
    module = make_module(**SMALL)
    context = make_context(text(0, 7), rule=rule, budget=6, depth=3)
    context.features = features(module, 0, 0, 6)
    proposal = drafter_of(module).propose([context])[0]
    proposal.validate()
    assert proposal.tree.num_nodes > 2
    oracle = Oracle(module, context)
    for node in range(proposal.tree.num_nodes):
        path = proposal.tree.path_tokens(node)
        law = softmax(shaped_row(oracle, context, path[:-1]))
        kept = proposal.laws[int(proposal.law_of[node])].double().numpy()
        np.testing.assert_allclose(kept, law, atol=1e-5)
        assert kept[path[-1]] > 0
        assert (kept > 0).sum() <= 9  # the draft vocabulary


@pytest.mark.parametrize(
    "rule",
    [
        Rule.GREEDY,
        Rule.COUPLED,
        Rule.REJECTION,
        # Rows of one token and of one law, as the first and the last of these.
        pytest.param(Rule.SAMPLE_MATCH, marks=pytest.mark.slow),
        pytest.param(Rule.BLOCK, marks=pytest.mark.slow),
    ],
)
def test_state_in_step_equals_scratch_whatever_is_committed(make_context, rule):
    """K/V of drafted rows must give way to rows made from the target's hidden states."""
    module = make_module(**KINDS["3.1"])
    drafter = drafter_of(module)
    rng = np.random.default_rng(2)
    texts = {i: text(i, 2 + 40 * i) for i in range(3)}
    given = dict.fromkeys(texts, 0)
    for number in range(6):
        part = [i for i in texts if (i + number) % 3]  # the others skip: their features pile up
        contexts = []
        for i in part:
            context = make_context(list(texts[i]), request_id=i, rule=rule, round=number)
            context.features = features(module, i, given[i], len(texts[i]) - 1)
            given[i] = len(texts[i]) - 1
            contexts.append(context)
        for i, context, proposal in zip(part, contexts, drafter.propose(contexts), strict=True):
            fresh = replace(context, features=features(module, i, 0, len(texts[i]) - 1))
            other = drafter_of(module)
            expected = other.propose([fresh])[0]
            assert paths_of(proposal.tree) == paths_of(expected.tree)
            np.testing.assert_allclose(proposal.tree.survival, expected.tree.survival, rtol=1e-4)
            mine, theirs = drafter._states[i], other._states[i]
            assert mine.length == theirs.length == len(texts[i]) - 1
            for name in ("keys", "values"):
                columns = [getattr(s, name)[:, : mine.length] for s in (mine, theirs)]
                torch.testing.assert_close(*columns, atol=1e-5, rtol=1e-5)
            offered = proposal.tree.path_tokens(proposal.tree.num_nodes - 1)
            texts[i] += [*offered[: number % 3], *rng.integers(0, 23, 1 + number).tolist()]
    drafter.release(1)
    drafter.release(99)
    assert sorted(drafter._states) == [0, 2]


@pytest.mark.parametrize("rule", [Rule.GREEDY, Rule.REJECTION])
def test_a_request_alone_and_among_16_gets_the_same_proposals(make_context, rule):
    module = make_module(**SMALL)
    contexts = []
    for i in range(16):
        context = make_context(text(i, 3 + 19 * i), request_id=i, rule=rule, budget=4 + i % 5)
        context.features = features(module, i, 0, len(context.tokens) - 1)
        contexts.append(context)
    together = drafter_of(module).propose(contexts)
    for i in range(0, 16, 5):
        alone = drafter_of(module).propose([contexts[i]])[0]
        assert alone.tree.token.tolist() == together[i].tree.token.tolist()
        assert alone.tree.parent.tolist() == together[i].tree.parent.tolist()
        np.testing.assert_allclose(alone.tree.survival, together[i].tree.survival, rtol=1e-5)


def test_a_level_is_one_forward_and_buffers_grow_by_doubling(make_context):
    module = make_module(**SMALL)
    drafter, calls, sizes = drafter_of(module), [], set()
    decode = module.decode
    module.decode = lambda *args: calls.append(1) or decode(*args)
    tokens = text(0, 1400)
    context = make_context(tokens[:2], depth=3)
    done = 0
    for size in range(2, 1400, 42):
        context.tokens, context.features = tokens[:size], features(module, 0, done, size - 1)
        done = size - 1
        calls.clear()
        drafter.propose([context])
        assert len(calls) <= 3  # the anchor's row and two levels
        sizes.add(drafter._states[0].keys.shape[1])
    assert len(sizes) <= 4


def test_history_processors_see_the_path(make_context):
    drafter = drafter_of(make_module(**FULL), min_survival=0.0)
    context = make_context([1, 2], params={"presence_penalty": 2.0, "frequency_penalty": 2.0})
    context = replace(context, width=1, depth=5, budget=5)
    context.features = features(drafter._module, 0, 0, 1)
    seen = record_logits(drafter)
    tree = drafter.propose([context])[0].tree
    path = tuple(tree.path_tokens(tree.num_nodes - 1))
    assert len(path) == 5
    for size in range(5):
        oracle = SimpleNamespace(logits=lambda _, row=seen[0, path[:size]]: row.numpy())
        plain = shaped_row(oracle, replace(context, params=SamplingParams()), path[:size])
        counts = np.bincount([*path[:size]], minlength=23)
        assert path[size] == np.argmax(plain - 2.0 * counts - 2.0 * (counts > 0))


@pytest.mark.parametrize("rule", list(Rule))
def test_broken_hidden_states_cost_the_draft_and_are_reported_once(make_context, caplog, rule):
    module = make_module(**SMALL)
    drafter = drafter_of(module)
    contexts = [make_context(text(i, 9), request_id=i, rule=rule) for i in range(3)]
    for i, context in enumerate(contexts):
        context.features = features(module, i, 0, 8)
    contexts[0].features[1][7] = torch.nan  # the anchor's row
    contexts[1].features[1][3] = torch.inf  # one before it: the draft does without
    with caplog.at_level(logging.WARNING):
        first, second, third = drafter.propose(contexts)
        again = replace(contexts[0], tokens=[*contexts[0].tokens, 5])
        again.features = features(module, 0, 8, 9)
        recovered = drafter.propose([again])[0]
    assert first.tree.num_nodes == 0
    assert min(p.tree.num_nodes for p in (second, third, recovered)) > 0
    assert drafter._states[1].length == 7
    assert len(caplog.records) == 1


def test_broken_weights_cost_the_draft_only(make_context, caplog):
    module = make_module(**SMALL)
    module.lm_head.weight[2] = torch.nan
    context = make_context(text(0, 9))
    context.features = features(module, 0, 0, 8)
    drafter = drafter_of(module)
    with caplog.at_level(logging.WARNING):
        assert drafter.propose([context])[0].tree.num_nodes == 0
    assert len(caplog.records) == 1


def test_gaps_and_rewritten_contexts_are_drafted_from_what_is_known(make_context):
    module = make_module(**SMALL)
    drafter = drafter_of(module)
    context = make_context(text(0, 9))
    early = replace(context, tokens=context.tokens[:6])
    assert drafter.propose([early])[0].tree.num_nodes == 0  # nothing has come yet
    context.features = features(module, 0, 5, 8)
    tree = drafter.propose([context])[0].tree
    assert tree.num_nodes > 0
    assert drafter._states[0].length == 3
    twice = drafter.propose([replace(context, features=None)])[0].tree
    assert twice.token.tolist() == tree.token.tolist()
    rewritten = replace(context, tokens=[*context.tokens[:4], 1, 2])
    rewritten.features = features(module, 0, 0, 5)
    fresh = drafter_of(module).propose([rewritten])[0].tree
    assert drafter.propose([rewritten])[0].tree.token.tolist() == fresh.token.tolist()


def test_rounds_that_are_only_observed_leave_no_gap(make_context):
    module = make_module(**SMALL)
    drafter = drafter_of(module)
    assert isinstance(drafter, Observer)
    tokens = text(0, 14)
    for start, stop in ((0, 6), (6, 9)):
        context = make_context(tokens[: stop + 1])
        context.features = features(module, 0, start, stop)
        drafter.observe([context])
    context = replace(context, tokens=tokens, features=features(module, 0, 9, 13))
    fresh = replace(context, features=features(module, 0, 0, 13))
    assert tokens_of(drafter, context) == tokens_of(drafter_of(module), fresh) != []
    assert drafter._states[0].length == 13


def test_features_that_do_not_fit_are_refused(make_context):
    module = make_module(**SMALL)
    context = make_context(text(0, 4))
    context.features = features(module, 0, 0, 4)
    with pytest.raises(ShapeError, match="4 rows"):
        drafter_of(module).propose([context])
    context.features = {0: context.features[0]}
    with pytest.raises(ShapeError, match="layer 3"):
        drafter_of(module).propose([context])


# -- files ------------------------------------------------------------------------------------


def fake_target(**changes):
    info = TargetInfo(
        name="toy",
        family="toy",
        vocab_size=23,
        hidden_size=E,
        num_layers=6,
        max_positions=512,
        eos_token_ids=(),
        dtype="float32",
        device="cpu",
    )
    return SimpleNamespace(info=replace(info, **changes), embed=lend)


def tokens_of(drafter, context):
    return drafter.propose([context])[0].tree.token.tolist()


SAVED = [
    ("eagle3", "llama"),
    ("eagle3", "biased"),
    ("eagle3", "3.1"),
    ("eagle3", "input norm"),
    ("eagle3", "qwen"),
    ("speculators", "llama"),
    ("speculators", "qwen"),
    ("deepspec", "qwen"),
    ("deepspec", "gemma"),
]


@pytest.mark.parametrize(("layout", "kind"), SAVED)
def test_what_a_layout_holds_is_read_back(tmp_path, make_context, layout, kind):
    module = make_module(**{**KINDS[kind], "target_layers": (0, 1, 4)})
    save_eagle3(tmp_path, module, layout=layout, num_target_layers=6)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert is_eagle3(raw)
    ids = raw.get("target_layer_ids") or raw["eagle_aux_hidden_state_layer_ids"]
    assert ids == ([0, 1, 4] if layout == "deepspec" else [1, 2, 5])
    loaded = load_eagle3(tmp_path, fake_target())
    assert isinstance(loaded, Drafter)
    assert loaded.capture == (0, 1, 4)
    context = make_context(text(0, 8))
    context.features = features(module, 0, 0, 7)
    assert tokens_of(loaded, context) == tokens_of(drafter_of(module), context) != []
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("midlayer.") for name in names) == (layout == "eagle3")


@pytest.fixture
def saved(tmp_path):
    save_eagle3(tmp_path, make_module(**KINDS["llama"]), layout="eagle3")
    return tmp_path


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_older_spellings_are_read(saved, make_context):
    context = make_context(text(0, 8))
    context.features = {k: features(make_module(**SMALL), 0, 0, 7)[0] for k in range(-1, 6)}
    expected = tokens_of(load_eagle3(saved, fake_target()), context)
    ids = json.loads((saved / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    edit_config(
        saved,
        drop=("eagle_aux_hidden_state_layer_ids", "rope_parameters", "norm_output"),
        architectures=["LlamaForCausalLM"],
        rope_theta=10000.0,
        rope_scaling=None,
        eagle_config={"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
    )

    def rename(tensors):
        for name in list(tensors):
            tensors["model." + name.replace("midlayer", "layers.0")] = tensors.pop(name)

    edit_tensors(saved, rename)
    assert tokens_of(load_eagle3(saved, fake_target()), context) == expected


def test_without_layer_ids_the_usual_three_are_read_as_inputs(saved):
    edit_config(saved, drop=("eagle_aux_hidden_state_layer_ids",))
    assert load_eagle3(saved, fake_target(num_layers=32)).capture == (1, 15, 28)  # inputs 2, 16, 29
    with pytest.raises(ConfigError, match="eagle_aux_hidden_state_layer_ids"):
        load_eagle3(saved, fake_target(num_layers=4))


@pytest.mark.parametrize(
    ("changes", "target", "error", "says"),
    [
        ({}, {"vocab_size": 24}, ConfigError, "vocab_size is 23"),
        ({}, {"hidden_size": 16}, ConfigError, "target_hidden_size is 12"),
        ({}, {"num_layers": 3}, ConfigError, "eagle_aux_hidden_state_layer_ids"),
        ({"num_hidden_layers": 2}, {}, CapabilityError, "num_hidden_layers"),
        ({"hidden_size": "12"}, {}, CheckpointError, "hidden_size"),
        ({"fc_norm": 1}, {}, CheckpointError, "fc_norm"),
        ({"fc_norm": True}, {}, CheckpointError, r"lacks tensors fc_norm\.0\.weight"),
        ({"draft_vocab_size": 24}, {}, ConfigError, "draft_vocab_size is 24"),
        ({"draft_vocab_size": 8}, {}, CheckpointError, "lm_head|d2t"),
        ({"hidden_act": "mish"}, {}, ConfigError, "mish"),
        ({"quantization_config": {"bits": 4}}, {}, CapabilityError, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, {}, ConfigError, "dynamic"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, {}, CapabilityError, "DeepseekV2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(saved, changes, target, error, says):
    edit_config(saved, **changes)
    with pytest.raises(error, match=says) as caught:
        load_eagle3(saved, fake_target(**target))
    assert caught.value.message.count("\n") == 0


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder):
    index = {"weight_map": {"fc.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def renamed_to(old, new):
    return lambda folder: edit_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def replaced(name, make):
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: make(t[name])}))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (cut, "not a whole safetensors file"),
        (pickled, "pickled"),
        (sharded, "model-00002"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
        (renamed_to("norm.weight", "norms.weight"), r"lacks tensor norm\.weight"),
        (replaced("norm.weight", lambda t: t[:5].clone()), r"norm\.weight .* \[5\]"),
        (replaced("fc.weight", lambda t: t.to(torch.int8)), r"fc\.weight .*int8"),
        (replaced("d2t", lambda t: t + 50), "d2t"),
        (replaced("d2t", lambda t: t * 0), "d2t and t2d"),
        (lambda f: edit_tensors(f, lambda t: t.pop("d2t")), "lacks tensor d2t"),
        (lambda f: edit_tensors(f, lambda t: t.update(more=torch.ones(1))), "unknown.* more"),
    ],
)
def test_a_broken_file_is_refused_by_name(saved, break_it, says):
    break_it(saved)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_eagle3(saved, fake_target())
    assert caught.value.message.count("\n") == 0


def test_a_target_that_lends_no_embedding_is_named(saved):
    target = fake_target()
    with pytest.raises(CapabilityError, match="toy does not lend"):
        load_eagle3(saved, SimpleNamespace(info=target.info))
    with pytest.raises(CapabilityError, match="embedding"):
        Eagle3Drafter(make_module(**KINDS["llama"]))


def test_layouts_that_cannot_say_it_are_refused(tmp_path):
    for layout, kind in (("deepspec", "llama"), ("eagle3", "gemma"), ("deepspec", "3.1")):
        with pytest.raises(ConfigError, match=layout):
            save_eagle3(tmp_path, make_module(**KINDS[kind]), layout=layout)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "proportional"])
def test_scaled_rope_is_built_on_any_device(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    with torch.device("meta"):
        attention = Eagle3Module(Eagle3Config(**{**SMALL, "rope": rope})).layers[0].self_attn
    assert attention._frequencies.shape == (3,)
    assert bool(attention._frequencies.isfinite().all())


@pytest.mark.parametrize("options", [{"width": 0}, {"beams": 0}, {"min_survival": 1.0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError):
        GrowthConfig(**options)


def test_what_is_not_eagle3_is_not_taken_for_it():
    assert not is_eagle3({"architectures": ["LlamaForCausalLM"]})
    assert not is_eagle3({"architectures": ["Qwen3DSparkModel"]})
    assert not is_eagle3({"speculators_model_type": "dflash", "architectures": ["Eagle3"]})
    assert not is_eagle3({})


# -- behind the engine ------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [11], [20, 21, 22, 23] * 6, [40, 3, 41, 3, 42]]
SAMPLING = {
    "greedy": SamplingParams(max_tokens=12, tree_budget=7, depth=4),
    "T1": SamplingParams(max_tokens=12, temperature=1.0, seed=3, tree_budget=7, depth=4),
}


@functools.cache
def engine_drafter(family):
    target = random_target(family, exact=True)
    shape = {**SMALL, "vocab_size": VOCAB, "draft_vocab_size": 60, "has_embedding": False}
    shape |= {"hidden_size": 64, "target_hidden_size": 64}
    embed = getattr(target, "embed", None) or target._backbone.get_input_embeddings()
    return Eagle3Drafter(make_module(**shape), embed=embed)


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        ("llama", "T1"),
        ("gemma3", "greedy"),  # which scales its embeddings
        pytest.param("gemma3", "T1", marks=pytest.mark.slow),
        pytest.param("qwen3", "greedy", marks=pytest.mark.slow),
    ],
)
def test_the_engine_gives_the_text_of_plain_decoding(family, sampling):
    results = {}
    for name, drafter in (("plain", None), ("eagle3", engine_drafter(family))):
        engine = dspark.Engine(
            random_target(family, exact=True),
            drafter=drafter,
            config=dspark.EngineConfig(auto_off=False),
        )
        results[name] = list(engine.generate(PROMPTS, SAMPLING[sampling]))
    for plain, drafted in zip(results["plain"], results["eagle3"], strict=True):
        assert drafted.error is None
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.proposed > 0
    assert not engine_drafter(family)._states  # every request was released


def test_errors_are_of_the_house_tree():
    assert issubclass(CheckpointError, DsparkError)
