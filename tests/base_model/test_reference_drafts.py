"""Claims of the notes on MTP-1 and DSpark that the plain draft modules must bear out."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.base_model import oracle
from tests.base_model import reference_drafts as drafts

SAME = 1e-12  # relative, in float64: measured at most 2e-15
VISIBLE = 1e-4  # what a change that matters must show at least

WINDOW = 6
SMALL = {
    "sliding_window": WINDOW,
    "n_routed_experts": 3,  # few, so that a handful of rows takes each
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(50 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(60 + seed)
    return torch.randint(0, 90, (count,), generator=generator).tolist()


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()


@functools.cache
def case(stages: drafts.Stages, dtype: torch.dtype = torch.float64):
    config = drafts.tiny_draft_config(stages, **SMALL)
    target = oracle.random_weights(config, 0, dtype)
    return config, target | drafts.random_draft_weights(config, stages, 0, dtype)


def streams_of(count: int) -> Tensor:
    return draw(count, 4, 64)


def captured_of(count: int) -> Tensor:
    return draw(count, 3 * 64, seed=1)


def changed(value: Tensor, row: int) -> Tensor:
    value = value.clone()
    value[row] += draw(*value.shape[1:], seed=9)
    return value


# --------------------------------------------------------------------------------------- both kinds


@pytest.mark.parametrize("stages", ["mtp", "dspark"])
def test_both_precisions_agree_behind_a_real_target(stages):
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        config, weights = case(stages, dtype)
        ids = tokens(12)
        hidden = oracle.path_hidden(config, weights, ids[:11])
        if stages == "mtp":
            found = drafts.mtp_logits(config, weights, hidden[-1], ids, [3, 4, 3])
            assert found.shape == (4, 97)
        else:
            captured = drafts.captured_hidden(config, hidden)
            assert captured.shape == (11, 192)
            assert torch.equal(captured[:, :64], hidden[0].sum(1) / 4)
            z, base = drafts.dspark_block(config, weights, captured, ids[11])
            assert (z.shape, base.shape) == ((5, 64), (5, 97))
            logits, sure = drafts.dspark_chain(weights, z, base, ids[11], [3, 4, 3, 5, 6])
            assert (logits.shape, sure.shape) == ((5, 97), (5,))
            found = torch.cat([logits, sure[:, None]], dim=1)
        assert found.dtype == dtype
        outputs[dtype] = found.double()
    assert difference(outputs[torch.float32], outputs[torch.float64]) < 2e-5


@pytest.mark.parametrize("stages", ["mtp", "dspark"])
def test_shapes_are_those_of_what_is_drawn(stages):
    config, weights = case(stages)
    shapes = drafts.draft_shapes(config, stages)
    assert {k: tuple(w.shape) for k, w in weights.items() if k.startswith("mtp.")} == shapes
    # The counts of the official checkpoints, without scales: 3 tensors an expert, and the rest.
    layer = 18 + 3 * (1 + 3)
    assert len(shapes) == {"mtp": layer + 4 + 4, "dspark": 3 * layer + 2 + 4 + 3}[stages]
    assert not any("tid2eid" in k or "compressor" in k for k in shapes)


def unmoved(stages: drafts.Stages, ask: Callable[[dict[str, Tensor], int], Tensor]) -> list[str]:
    """The tensors whose change shows in none of a few questions."""
    _, weights = case(stages)
    plain = functools.cache(lambda seed: ask(weights, seed))

    def moves(name: str, other: Tensor) -> bool:
        changed_weights = {**weights, name: other}
        return any(
            difference(ask(changed_weights, seed), plain(seed)) > VISIBLE for seed in range(12)
        )

    found = []
    for name, value in weights.items():
        if not name.startswith(("mtp.", "embed.", "head.")):
            continue
        if name.endswith("gate.bias"):  # adds to scores alone: keep each expert out in turn
            others = [value - 10 * row for row in torch.eye(len(value))]
        else:
            others = [value + value.square().mean().sqrt() * draw(*value.shape, seed=3)]
        if not all(moves(name, other) for other in others):
            found.append(name)
    return found


def test_every_tensor_of_mtp_matters():
    config, _ = case("mtp")

    def ask(weights: dict[str, Tensor], seed: int) -> Tensor:
        return drafts.mtp_logits(config, weights, streams_of(2), tokens(3, seed), [5 + seed])

    assert not unmoved("mtp", ask)


def test_every_tensor_of_dspark_matters():
    config, _ = case("dspark")
    narrow = {**config, "dspark_block_size": 1}  # the quickest block that uses every tensor

    def ask(weights: dict[str, Tensor], seed: int) -> Tensor:
        z, base = drafts.dspark_block(narrow, weights, captured_of(1), seed)
        logits, sure = drafts.dspark_chain(weights, z, base, seed, [])
        return torch.cat([logits, sure[:, None]], dim=1)

    assert not unmoved("dspark", ask)


# -------------------------------------------------------------------------------------------- MTP-1


def test_mtp_sees_its_window_and_nothing_before():
    config, weights = case("mtp")
    n = 9
    streams, ids = streams_of(n), tokens(n + 1)
    plain = drafts.mtp_logits(config, weights, streams, ids, [5])
    for row in range(n):
        pushed = drafts.mtp_logits(config, weights, changed(streams, row), ids, [5])
        # The row that predicts x_{n+1} is n - 1; rows up to n - 1 - WINDOW + 1 are in its window.
        matters = row >= n - WINDOW
        assert (difference(pushed, plain) > VISIBLE) == matters
        # Row t holds x_{t+1}.
        other = [*ids[: row + 1], 96, *ids[row + 2 :]]
        renamed = drafts.mtp_logits(config, weights, streams, other, [5])
        assert (difference(renamed, plain) > VISIBLE) == matters
        if not matters:
            assert torch.equal(pushed, plain)
            assert torch.equal(renamed, plain)


def test_mtp_never_reads_the_first_token():
    config, weights = case("mtp")
    one = drafts.mtp_logits(config, weights, streams_of(2), [5, 6, 7])
    assert torch.equal(one, drafts.mtp_logits(config, weights, streams_of(2), [8, 6, 7]))
    assert difference(drafts.mtp_logits(config, weights, streams_of(2), [5, 9, 7]), one) > VISIBLE


def test_mtp_depends_on_relative_positions_alone():
    config, weights = case("mtp")
    streams, ids = streams_of(15), tokens(16)
    long = drafts.mtp_logits(config, weights, streams, ids, [5, 6])
    short = drafts.mtp_logits(config, weights, streams[-WINDOW:], ids[-WINDOW - 1 :], [5, 6])
    assert difference(short, long) < SAME


def test_mtp_recursion_is_a_committed_row_of_its_own_streams():
    config, weights = case("mtp")
    part = oracle.below(weights, "mtp.0.")
    n = 8
    streams, ids = streams_of(n), tokens(n + 3)
    drafted = drafts.mtp_logits(config, weights, streams, ids[: n + 1], ids[n + 1 :])
    for k in range(3):
        committed = drafts.mtp_logits(config, weights, streams, ids[: n + 1 + k])
        assert difference(drafted[k : k + 1], committed) < SAME
        rows = [
            drafts.mtp_input(config, weights, row, token)
            for row, token in zip(streams, ids[1 : n + 1 + k], strict=True)
        ]
        left = drafts.mtp_last_row(config, part, rows)
        streams = torch.cat([streams, left[None]])


def test_mtp_refuses_what_does_not_pair():
    config, weights = case("mtp")
    for rows, count in ((3, 3), (3, 5), (0, 1)):
        with pytest.raises(ValueError, match="one token more"):
            drafts.mtp_logits(config, weights, streams_of(rows), tokens(count))


# ------------------------------------------------------------------------------------------- DSpark


def block(count: int = 9, anchor: int = 7, **changes) -> Tensor:
    config, weights = case("dspark")
    _, base = drafts.dspark_block({**config, **changes}, weights, captured_of(count), anchor)
    return base


def test_slots_see_each_other_both_ways():
    plain = block()
    noise, anchor = block(dspark_noise_token_id=11), block(anchor=8)
    assert min(difference(noise[i], plain[i]) for i in range(5)) > VISIBLE
    assert min(difference(anchor[i], plain[i]) for i in range(5)) > VISIBLE
    # So another number of slots is another answer in every slot.
    assert min(difference(block(dspark_block_size=6)[i], plain[i]) for i in range(5)) > VISIBLE
    alone = block(dspark_block_size=1)
    assert torch.equal(alone, block(dspark_block_size=1, dspark_noise_token_id=11))


@pytest.mark.parametrize("count", [WINDOW - 1, WINDOW, WINDOW + 3])
def test_a_block_sees_as_much_context_as_the_window_is_wide(count):
    config, weights = case("dspark")
    config = {**config, "dspark_block_size": 2}
    captured = captured_of(count)
    _, plain = drafts.dspark_block(config, weights, captured, 7)
    for row in range(count):
        _, pushed = drafts.dspark_block(config, weights, changed(captured, row), 7)
        if row < count - WINDOW:
            assert torch.equal(pushed, plain)
        else:  # all slots alike
            assert min(difference(pushed[i], plain[i]) for i in range(2)) > VISIBLE


def test_a_block_depends_on_relative_positions_alone():
    config, weights = case("dspark")
    captured = captured_of(WINDOW + 9)
    _, long = drafts.dspark_block(config, weights, captured, 7)
    _, short = drafts.dspark_block(config, weights, captured[-WINDOW:], 7)
    assert difference(short, long) < SAME
    swapped = captured.clone()
    swapped[[-1, -3]] = captured[[-3, -1]]
    assert difference(drafts.dspark_block(config, weights, swapped, 7)[1], long) > VISIBLE


def test_block_attention_in_its_relative_form():
    """Complex pairs turned by the distance between slot and row, nothing turned back after."""
    config, weights = case("dspark")
    part = oracle.below(weights, "mtp.1.attn.")
    heads, width, dim = 4, 32, 8
    x, context = draw(5, 64, seed=4), draw(WINDOW + 3, 64, seed=5)
    rows = torch.cat([context[-WINDOW:], x])
    positions = torch.arange(3, 3 + WINDOW + 5)

    def normed(value: Tensor) -> Tensor:
        return value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    latent = normed(x @ part["wq_a.weight"].T) * part["q_norm.weight"]
    queries = normed((latent @ part["wq_b.weight"].T).unflatten(-1, (heads, width)))
    keys = normed(rows @ part["wkv.weight"].T) * part["kv_norm.weight"]
    theta = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    distance = positions[None, :] - positions[-5:, None]  # [slot, row], of the row from the slot
    spin = torch.exp(1j * distance[:, :, None] * theta)
    pairs = torch.view_as_complex(keys[:, -dim:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(spin * pairs).flatten(-2)  # [slot, row, dim]
    seen = torch.cat([keys[:, :-dim].expand(5, -1, -1), turned], dim=-1)
    powers = torch.exp(torch.einsum("shc,src->shr", queries, seen) / width**0.5)
    shares = powers / (powers.sum(-1, keepdim=True) + part["attn_sink"].exp()[:, None])
    found = torch.einsum("shr,src->shc", shares, seen).flatten(1)
    low = torch.einsum(
        "sgk,grk->sgr", found.unflatten(1, (2, -1)), part["wo_a.weight"].view(2, 16, -1)
    )
    expected = low.flatten(1) @ part["wo_b.weight"].T

    assert difference(drafts.block_attention(config, part, x, context), expected) < SAME


def test_the_order_of_captured_layers_matters():
    config, weights = case("dspark")
    hidden = [draw(9, 4, 64, seed=layer) for layer in range(3)]
    answers = []
    for order in ([0, 1, 2], [2, 1, 0]):
        told = {**config, "dspark_target_layer_ids": order}
        captured = drafts.captured_hidden(told, hidden)
        answers.append(drafts.dspark_block(told, weights, captured, 7)[1])
    assert difference(*answers) > VISIBLE


def test_a_block_without_context_has_only_its_slots():
    assert block(count=0).isfinite().all()
    assert difference(block(count=0), block(count=1)) > VISIBLE


def test_a_slot_of_the_chain_follows_the_token_before_it_alone():
    config, weights = case("dspark")
    z, base = drafts.dspark_block(config, weights, captured_of(9), 7)
    path = tokens(5)
    logits, sure = drafts.dspark_chain(weights, z, base, 7, path)
    for changed_one in range(5):
        other = [96 if i == changed_one else t for i, t in enumerate(path)]
        new_logits, new_sure = drafts.dspark_chain(weights, z, base, 7, other)
        for slot in range(5):  # t_{i} is path[i - 1]
            same = slot != changed_one + 1
            assert torch.equal(new_logits[slot], logits[slot]) == same
            assert torch.equal(new_sure[slot], sure[slot]) == same
    short_logits, short_sure = drafts.dspark_chain(weights, z, base, 7, path[:2])
    assert torch.equal(short_logits, logits[:3])
    assert torch.equal(short_sure, sure[:3])


def test_confidence_reads_the_state_before_the_norm():
    config, weights = case("dspark")
    name = "mtp.2.norm.weight"
    pushed = {**weights, name: weights[name] + draw(64)}
    (logits, sure), (new_logits, new_sure) = (
        drafts.dspark_chain(w, *drafts.dspark_block(config, w, captured_of(9), 7), 7, [1, 2, 3, 4])
        for w in (weights, pushed)
    )
    assert difference(new_logits, logits) > VISIBLE
    assert torch.equal(new_sure, sure)
    assert sure.abs().max() < 8  # no sigmoid is saturated


def test_the_greedy_chain_is_greedy_and_corrected():
    config, weights = case("dspark")
    captured = captured_of(9)
    path = drafts.dspark_greedy(config, weights, captured, 7)
    z, base = drafts.dspark_block(config, weights, captured, 7)
    logits, _ = drafts.dspark_chain(weights, z, base, 7, path)
    assert logits.argmax(-1).tolist() == path
    assert base.argmax(-1).tolist() != path
