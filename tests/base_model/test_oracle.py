"""The oracle against transformers, and proof that the comparison sees every ingredient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.base_model import hf_reference, oracle

# Relative to the largest number. Measured with three seeds of every case: at most 2e-6.
TOLERANCE = 2e-5
# A fault must show at least this much; the least visible below shows 0.057.
VISIBLE = 1e-2
# Selections closer than this could fall differently in float32; the seeds avoid them.
SAFE_MARGIN = 5e-5

CASES: dict[str, dict] = {
    "every kind": {},
    "as many sinkhorn steps as released": {
        "compress_ratios": [0, 4, 8, 4, 0],
        "num_hash_layers": 2,
        "hc_sinkhorn_iters": 20,
    },
    "sliding only": {"compress_ratios": [0, 0, 0], "num_hash_layers": 0, "sliding_window": 5},
    "sparse only": {"compress_ratios": [4, 4, 4], "sliding_window": 6, "index_topk": 2},
    "heavy only": {"compress_ratios": [8, 8], "num_hash_layers": 1},
    "like Pro": {"compress_ratios": [8, 8, 4, 8, 4], "num_hash_layers": 3},
    "ratio 6, window 7": {"compress_ratios": [6, 4, 6], "sliding_window": 7},
    "ratio 3, window 1": {"compress_ratios": [3, 0, 4], "sliding_window": 1},
    "window of one entry": {"compress_ratios": [4, 16], "sliding_window": 4},
    "one indexer head": {"compress_ratios": [4, 4], "index_n_heads": 1, "index_topk": 1},
    "nothing dropped": {"compress_ratios": [4, 4], "index_topk": 100},
    "hash everywhere": {"num_hash_layers": 9},
    "trailing draft layers": {"compress_ratios": [0, 4, 8, 0, 0, 0], "num_hidden_layers": 3},
    "no yarn": {"compress_ratios": [4, 8], "rope_scaling": None},
    "yarn over a tiny context": {
        "compress_ratios": [4, 8],
        "max_position_embeddings": 96,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 6,  # low and high end of the ramp coincide
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "other sizes": {
        "compress_ratios": [4, 0, 8],
        "num_attention_heads": 6,
        "head_dim": 16,
        "o_groups": 3,
        "index_head_dim": 8,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 2,
    },
    "one stream, one sinkhorn step": {
        "compress_ratios": [0, 4],
        "hc_mult": 1,
        "hc_sinkhorn_iters": 1,
    },
    "one sinkhorn step": {"compress_ratios": [0, 4], "hc_sinkhorn_iters": 1},
    "large epsilons": {"compress_ratios": [0, 4, 8], "rms_norm_eps": 0.1, "hc_eps": 0.05},
}
# Where seed 0 leaves a selection closer than SAFE_MARGIN.
SEEDS = {"one indexer head": 2, "one sinkhorn step": 2}


def tokens(count: int, seed: int = 0) -> list[int]:
    draws = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 97, (count,), generator=draws).tolist()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()


@functools.cache
def case(name: str, seed: int = 0):
    config = oracle.tiny_config(**CASES[name])
    weights = oracle.random_weights(config, seed)
    return config, weights, hf_reference.build(config, weights)


@functools.cache
def answer(name: str, count: int, seed: int = 0) -> oracle.Run:
    config, weights, _ = case(name, seed)
    found = oracle.run(config, weights, tokens(count, seed))
    assert found.margin.min() > SAFE_MARGIN, "choose another seed: a selection is nearly a tie"
    return found


@functools.cache
def their_logits(name: str, count: int, seed: int = 0) -> torch.Tensor:
    return hf_reference.logits(case(name, seed)[2], tokens(count, seed))


# ---------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize("name", CASES)
def test_oracle_equals_transformers(name):
    seed = SEEDS.get(name, 0)
    theirs = their_logits(name, 45, seed)
    assert difference(answer(name, 45, seed).logits, theirs) < TOLERANCE


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_oracle_equals_transformers_for_other_weights(seed):
    _, _, model = case("every kind", seed)
    found = answer("every kind", 70, seed)
    ids = tokens(70, seed)
    assert difference(found.logits, hf_reference.logits(model, ids)) < TOLERANCE
    for ours, theirs in zip(found.hidden, hf_reference.hidden(model, ids), strict=True):
        assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [  # that later tokens change nothing before them is tested below
        "every kind",
        pytest.param("ratio 6, window 7", marks=pytest.mark.slow),
        pytest.param("one indexer head", marks=pytest.mark.slow),
    ],
)
def test_oracle_equals_transformers_at_every_length(name):
    seed = SEEDS.get(name, 0)
    config, weights, model = case(name, seed)
    whole, ids = answer(name, 45, seed).logits, tokens(45, seed)
    for count in (*range(1, 6), 7, 8, 15, 16, 17, 33):
        theirs = hf_reference.logits(model, ids[:count])
        assert difference(whole[:count], theirs) < TOLERANCE
    for count in (1, 3, 4, 5, 8, 17):
        ours = oracle.path_logits(config, weights, ids[:count])
        assert difference(ours, whole[:count]) < TOLERANCE


@pytest.mark.parametrize("chunks", [[1] * 33, [7, 1, 5, 11, 2, 9, 10], [45], [16, 8, 4, 17]])
def test_oracle_equals_transformers_through_its_cache(chunks):
    """Token by token through twice the window and four entries of the heavy kind, and in chunks."""
    _, _, model = case("every kind")
    theirs = hf_reference.decode(model, tokens(sum(chunks)), chunks)
    assert difference(answer("every kind", 45).logits[: sum(chunks)], theirs) < TOLERANCE


def test_the_public_questions_are_one_run():
    config, weights, _ = case("every kind")
    found, ids = answer("every kind", 45), tokens(45)
    assert torch.equal(oracle.path_logits(config, weights, ids), found.logits)
    assert torch.equal(oracle.selection_margin(config, weights, ids), found.margin)
    hidden = oracle.path_hidden(config, weights, ids)
    assert len(hidden) == config["num_hidden_layers"]
    assert all(torch.equal(a, b) for a, b in zip(hidden, found.hidden, strict=True))


# ---------------------------------------------------------------------------- teeth: planted faults


def _weights(change: Callable) -> Callable:
    """A fault in the tensors whose names end with something."""

    def plant(_patch, config, weights):
        return config, {name: change(name, tensor) for name, tensor in weights.items()}

    return plant


def _without(*endings: str, value: float = 0.0) -> Callable:
    return _weights(lambda k, w: torch.full_like(w, value) if k.endswith(endings) else w)


def _config(**changes) -> Callable:
    return lambda _patch, config, weights: ({**config, **changes}, weights)


def _code(name: str, make: Callable) -> Callable:
    """A fault in one function of the oracle: `make` gets the right one."""

    def plant(patch, config, weights):
        patch.setattr(oracle, name, make(getattr(oracle, name)))
        return config, weights

    return plant


def _mixing(change: Callable) -> Callable:
    return _code("mixing", lambda right: lambda *args: change(*right(*args)))


def _row_last_sinkhorn(right):
    def wrong(config, comb):
        comb = torch.softmax(comb, dim=-1)
        for _ in range(config["hc_sinkhorn_iters"]):
            comb = comb / comb.sum(dim=-2, keepdim=True)
            comb = comb / comb.sum(dim=-1, keepdim=True)
        return comb

    return wrong


def _clamped_product(right):
    def wrong(config, gate, up):
        return (F.silu(gate) * up).clamp(-config["swiglu_limit"], config["swiglu_limit"])

    return wrong


def _clamped_below(right):
    return lambda config, gate, up: right(config, gate.clamp(min=-config["swiglu_limit"]), up)


def _first_dimensions(right):
    def wrong(x, positions, theta):
        turned = 2 * len(theta)
        return right(x.roll(-turned, -1), positions, theta).roll(turned, -1)

    return wrong


def _half_split(right):
    def wrong(x, positions, theta):
        turned = 2 * len(theta)
        order = torch.arange(turned).view(2, -1).T.flatten()
        head, tail = x[..., :-turned], x[..., -turned:]
        tail = right(tail[..., order], positions, theta)[..., order.argsort()]
        return torch.cat([head, tail], dim=-1)

    return wrong


def _biased_shares(right):
    def wrong(config, weights, scores, token):
        chosen, gap = right(config, weights, scores, token)
        if "gate.bias" in weights:
            scores += weights["gate.bias"]
        return chosen, gap

    return wrong


def _swapped_halves(name, tensor):
    if ".compressor." in name and name.endswith(("wkv.weight", "wgate.weight")):
        return tensor.roll(len(tensor) // 2, 0)
    if ".compressor." in name and name.endswith("ape"):
        return tensor.roll(tensor.shape[1] // 2, 1)
    return tensor


FAULTS: dict[str, Callable] = {
    "no inverse rotation": _code("rotate_back", lambda _: lambda x, *_: x),
    "inverse rotation twice": _code("rotate_back", lambda f: lambda x, *a: f(f(x, *a), *a)),
    "rotated first dimensions": _code("rotate", _first_dimensions),
    "rotated halves": _code("rotate", _half_split),
    "no yarn": _config(rope_scaling=None),
    "yarn on sliding layers": _code("frequencies", lambda f: lambda c, _: f(c, 4)),
    "one theta": _config(compress_rope_theta=10000),
    "entries at their own count": _code("entry_position", lambda _: lambda entry, _: entry),
    "entries at their last token": _code(
        "entry_position", lambda _: lambda entry, m: entry * m + m - 1
    ),
    "entry hidden from its last token": _code(
        "visible_entries", lambda _: lambda position, m: position // m
    ),
    "window one longer": _code("first_in_window", lambda f: lambda c, t: max(0, f(c, t) - 1)),
    "window one shorter": _code("first_in_window", lambda f: lambda c, t: min(t, f(c, t) + 1)),
    "no ape": _without("ape"),
    "ape one late": _weights(lambda k, w: w.roll(1, 0) if k.endswith("ape") else w),
    "halves swapped": _weights(_swapped_halves),
    "no sink": _without("attn_sink", value=-math.inf),
    "queries not normed": _code("query_norm", lambda _: lambda _, q: q),
    "indexer ignored": _config(index_topk=1000),
    "indexer keeps one less": _config(index_topk=2),
    "indexer without ReLU": _code("rectify", lambda _: lambda products: products),
    "indexer weights without sign": _weights(
        lambda k, w: w.abs() if k.endswith("weights_proj.weight") else w
    ),
    "groups swapped": _weights(
        lambda k, w: w.roll(len(w) // 2, 0) if k.endswith("wo_a.weight") else w
    ),
    "post without its 2": _mixing(lambda pre, post, comb: (pre, post / 2, comb)),
    "comb transposed": _mixing(lambda pre, post, comb: (pre, post, comb.transpose(1, 2))),
    "no sinkhorn": _code("sinkhorn", lambda _: lambda _, comb: torch.softmax(comb, dim=-1)),
    "no comb": _mixing(lambda pre, post, comb: (pre, post, torch.eye(4).expand_as(comb))),
    "mean instead of head weights": _code(
        "head_collapse", lambda _: lambda _, streams, _hc: streams.mean(dim=1)
    ),
    "no clamp": _config(swiglu_limit=0),
    "clamped product": _code("swiglu", _clamped_product),
    "gate clamped below": _code("swiglu", _clamped_below),
    "no routing bias": _without("gate.bias"),
    "biased shares": _code("route", _biased_shares),
    "no route scale": _config(routed_scaling_factor=1.0),
    "one expert less": _config(num_experts_per_tok=1),
    "gate and up swapped": _weights(
        lambda k, w: w.flip(0) if k.endswith("shared_experts.w1.weight") else w
    ),
    "table of the next token": _weights(
        lambda k, w: w.roll(1, 0) if k.endswith("gate.tid2eid") else w
    ),
}


ENOUGH = 24  # tokens: past a window of 16 and with more entries than the indexer keeps


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault, monkeypatch):
    config, weights, _ = case("every kind")
    theirs = their_logits("every kind", ENOUGH)
    config, weights = FAULTS[fault](monkeypatch, config, weights)
    ours = oracle.path_logits(config, weights, tokens(ENOUGH))
    assert difference(ours, theirs) > VISIBLE


@pytest.mark.parametrize("name", ["other sizes", "one sinkhorn step"])
def test_the_order_of_sinkhorn_shows_before_it_converges(name, monkeypatch):
    seed = SEEDS.get(name, 0)
    config, weights, _ = case(name, seed)
    monkeypatch.setattr(oracle, "sinkhorn", _row_last_sinkhorn(oracle.sinkhorn))
    ours = oracle.path_logits(config, weights, tokens(45, seed))
    assert difference(ours, their_logits(name, 45, seed)) > VISIBLE


def test_the_epsilons_of_the_stream_weights_show(monkeypatch):
    """With 1e-6 they are below the tolerance, so this is the case with a large one."""
    config, weights, _ = case("large epsilons")
    right, theirs = oracle.mixing, their_logits("large epsilons", 45)
    eps = config["hc_eps"]
    for wrong in (
        lambda *a: (lambda pre, post, comb: (pre - eps, post, comb))(*right(*a)),
        lambda *a: (lambda pre, post, comb: (pre, post + eps, comb))(*right(*a)),
    ):
        monkeypatch.setattr(oracle, "mixing", wrong)
        ours = oracle.path_logits(config, weights, tokens(45))
        assert difference(ours, theirs) > VISIBLE


# ------------------------------------------------------------------------- teeth: no tensor is dead


@functools.cache
def gradients() -> dict[str, torch.Tensor]:
    config = oracle.tiny_config()
    weights = oracle.random_weights(config, 1, torch.float64)  # every expert gets enough tokens
    leaves = {k: w.requires_grad_() for k, w in weights.items() if w.is_floating_point()}
    logits = oracle.path_logits(config, weights, tokens(60))
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double())
    return {k: torch.zeros_like(w) if w.grad is None else w.grad for k, w in leaves.items()}


@functools.cache
def tensor_kinds() -> dict[str, list[str]]:
    """The tensors of the tiny model under their names without the layer."""
    kinds: dict[str, list[str]] = {}
    for name in oracle.tensor_shapes(oracle.tiny_config()):
        kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
        kinds.setdefault(kind, []).append(name)
    return kinds


SELECTORS = [
    k for k in tensor_kinds() if "indexer" in k or k in ("ffn.gate.bias", "ffn.gate.tid2eid")
]


def _observable(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """The part that can matter at all with these tokens."""
    if name == "embed.weight":
        return gradient[sorted(set(tokens(60)))]
    if name.startswith("layers.0.hc_attn"):
        # All streams are still equal: a norm follows their weighted sum, and mixing them with
        # columns that sum to 1 changes nothing. Only what post weights do is left.
        return gradient[1:2] if name.endswith("_scale") else gradient[4:8]
    return gradient


@pytest.mark.parametrize("kind", [k for k in tensor_kinds() if k not in SELECTORS])
def test_every_number_of_a_tensor_moves_the_logits(kind):
    for name in tensor_kinds()[kind]:
        gradient = _observable(name, gradients()[name])
        scale = gradient.abs().max()
        assert scale > 1e-2
        # A routed expert sees few of the tokens, and the clamp may cut a channel for all of them.
        alive = (gradient.abs() > 1e-9 * scale).double().mean()
        assert alive > (0.9 if "experts" in kind else 0.999), f"{name}: {alive:.4f}"


@pytest.mark.parametrize("kind", SELECTORS)
def test_every_tensor_that_only_selects_moves_the_logits(kind):
    config, weights, _ = case("every kind")
    for name in tensor_kinds()[kind]:
        changed = dict(weights)
        changed[name] = weights[name].roll(1, 0).roll(1, -1)
        ours = oracle.path_logits(config, changed, tokens(ENOUGH))
        assert difference(ours, answer("every kind", 45).logits[:ENOUGH]) > VISIBLE


def test_the_weights_have_exactly_the_tensors_that_transformers_expects():
    """`load_state_dict` is strict, so building is the proof; here for one tensor too many."""
    config, weights, _ = case("every kind")
    assert set(weights) == set(oracle.tensor_shapes(config))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.self_attn\.more"):
        hf_reference.build(config, {**weights, "layers.0.attn.more": torch.zeros(1)})


# ------------------------------------------------------------------------------- the random weights


def _spied(monkeypatch, name: str, note: Callable) -> list:
    noted: list = []
    right = getattr(oracle, name)

    def spy(*args, **kwargs):
        result = right(*args, **kwargs)
        noted.append(note(result, *args))
        return result

    monkeypatch.setattr(oracle, name, spy)
    return noted


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_weights_use_every_branch_and_saturate_none(seed, monkeypatch):
    def clipped(_, config, gate, up):
        return ((gate > config["swiglu_limit"]) | (up.abs() > config["swiglu_limit"])).float()

    def shares(_, queries, rows, sink):
        logits = queries @ rows.T * rows.shape[-1] ** -0.5
        return torch.softmax(torch.cat([logits, sink[:, None]], dim=-1), dim=-1)

    clips = _spied(monkeypatch, "swiglu", clipped)
    attended = _spied(monkeypatch, "attend", shares)
    picks = _spied(monkeypatch, "pick", lambda result, scores, _: (len(scores), result[0]))
    config = oracle.tiny_config()
    found = oracle.run(config, oracle.random_weights(config, seed), tokens(60, seed))

    assert 0.1 < torch.cat([c.flatten() for c in clips]).mean() < 0.6
    sinks = torch.stack([s[:, -1].mean() for s in attended])
    assert 0.02 < sinks.mean() < 0.5
    # Rows of late tokens: the largest share is neither everything nor nothing.
    largest = torch.stack([s.max(dim=-1).values.mean() for s in attended if s.shape[-1] > 16])
    assert 0.1 < largest.mean() < 0.7
    routed = [chosen for _, chosen in picks if len(chosen) == config["num_experts_per_tok"]]
    assert {e for chosen in routed for e in chosen} == set(range(config["n_routed_experts"]))
    dropped = [1 - len(chosen) / count for count, chosen in picks if count > 8]
    assert max(dropped) > 0.7
    assert len({tuple(sorted(chosen)) for count, chosen in picks if count > 10}) > 12
    assert all(0.3 < streams.std() < 10 for streams in found.hidden)
    assert 0.5 < found.logits.std() < 5


def test_random_weights_are_the_same_numbers_in_every_dtype():
    config = oracle.tiny_config()
    exact = oracle.random_weights(config, 3, torch.float64)
    narrow = oracle.random_weights(config, 3, torch.bfloat16)
    for name, tensor in narrow.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    assert narrow["layers.0.attn.wkv.weight"].dtype == torch.bfloat16
    assert narrow["layers.1.attn.compressor.ape"].dtype == torch.float32
    other = oracle.random_weights(config, 4, torch.float64)
    assert all(not torch.equal(tensor, other[name]) for name, tensor in exact.items())


def test_every_row_of_a_hash_table_holds_distinct_experts():
    config = oracle.tiny_config()
    table = oracle.random_weights(config)["layers.0.ffn.gate.tid2eid"]
    assert table.shape == (97, 2)
    assert table.dtype == torch.int64
    assert all(len(set(row)) == 2 and min(row) >= 0 and max(row) < 8 for row in table.tolist())


# ----------------------------------------------------------------------- precision, causality, ties


def test_float64_is_nowhere_rounded_to_float32():
    """A difference quotient with a step of 1e-7 is meaningless after any float32 rounding."""
    config, ids = oracle.tiny_config(), tokens(ENOUGH)
    weights = oracle.random_weights(config, 0, torch.float64)
    draws = torch.Generator().manual_seed(5)
    step = {
        name: 1e-7 * torch.randn(w.shape, generator=draws, dtype=w.dtype)
        for name, w in weights.items()
        if w.is_floating_point()
    }
    probe = torch.randn(ENOUGH, 97, generator=draws, dtype=torch.float64)

    def moved(sign):
        changed = {k: w + sign * step[k] if k in step else w for k, w in weights.items()}
        return (oracle.path_logits(config, changed, ids) * probe).sum()

    leaves = {k: w.clone().requires_grad_(k in step) for k, w in weights.items()}
    logits = oracle.path_logits(config, leaves, ids)
    (logits * probe).sum().backward()
    slope = sum((leaves[k].grad * step[k]).sum() for k in step if leaves[k].grad is not None)
    assert logits.dtype == torch.float64
    assert ((moved(1) - moved(-1)) / 2).item() == pytest.approx(slope.item(), rel=1e-5)


def test_narrow_weights_are_computed_in_float32():
    config = oracle.tiny_config(compress_ratios=[4])
    weights = oracle.random_weights(config, 0, torch.bfloat16)
    logits = oracle.path_logits(config, weights, tokens(10))
    wide = {k: w.float() if w.is_floating_point() else w for k, w in weights.items()}
    assert logits.dtype == torch.float32
    assert torch.equal(logits, oracle.path_logits(config, wide, tokens(10)))


def test_later_tokens_change_nothing_before_them():
    config = oracle.tiny_config()
    weights = oracle.random_weights(config, 0, torch.float64)
    whole = oracle.path_logits(config, weights, tokens(28))
    for kept in (1, 3, 4, 8, 20):
        other = tokens(28)[:kept] + tokens(28 - kept, seed=9)
        logits = oracle.path_logits(config, weights, other)
        torch.testing.assert_close(logits[:kept], whole[:kept], rtol=1e-11, atol=1e-11)
        assert difference(logits[kept], whole[kept]) > VISIBLE


def test_equal_scores_are_picked_by_index_by_us_and_by_the_patched_topk():
    scores = torch.tensor([0.0, 2.0, -0.0, 0.0, 2.0, -1.0, 0.0])
    chosen, gap = oracle.pick(scores, 4)
    assert (chosen, gap) == ([1, 4, 0, 2], 0.0)
    original = torch.topk
    with hf_reference.stable_topk():
        assert torch.topk(scores, 4).indices.tolist() == chosen
        assert scores.topk(4, dim=-1).values.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert torch.topk is original


def test_margin_is_infinite_while_nothing_is_left_out():
    config = oracle.tiny_config(compress_ratios=[0, 4, 8], num_hash_layers=3, index_topk=3)
    margin = oracle.selection_margin(config, oracle.random_weights(config), tokens(30))
    few = torch.arange(1, 31) // 4 <= 3
    assert torch.equal(margin.isinf(), few)
    assert (margin[~few] > 0).all()


def test_margin_tells_how_close_the_routing_is():
    config = oracle.tiny_config(compress_ratios=[0], num_hash_layers=0)
    weights = oracle.random_weights(config)
    name, ids = "layers.0.ffn.gate.bias", tokens(12)
    margin = oracle.selection_margin(config, weights, ids)
    before = oracle.path_logits(config, weights, ids)
    for size, same in ((0.49, True), (3.0, False)):
        # A bias that moves by less than half the smallest margin flips no selection.
        push = torch.randn(8, generator=torch.Generator().manual_seed(2)).sign()
        changed = {**weights, name: weights[name] + size * margin.min() * push}
        moved = difference(oracle.path_logits(config, changed, ids), before)
        assert moved < TOLERANCE if same else moved > VISIBLE


def test_margin_of_entries_that_all_score_zero_is_the_way_to_the_first_relu(monkeypatch):
    config = oracle.tiny_config(compress_ratios=[4], num_hash_layers=1, index_n_heads=1)
    weights = oracle.random_weights(config, 1)
    tied = _spied(monkeypatch, "pick", lambda result, *_: result[1] == 0)
    margin = oracle.selection_margin(config, weights, tokens(60))
    assert sum(tied) > 3
    assert (margin[torch.tensor(tied)] > 0).all()
