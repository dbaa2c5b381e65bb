"""The network that is trained computes what the package runs, forwards and backwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dspark.base_model.config import V4Config
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.names import Storage, expected_tensors
from dspark.base_model.presets import preset
from dspark.base_model.weights import DictSource
from dspark.errors import CheckpointError
from dspark.training.pretrain import ops
from dspark.training.pretrain.attention import Notes
from dspark.training.pretrain.network import (
    V4Network,
    fill_hash_tables,
    initialise,
    load_official,
    official_tensors,
    rounded_experts,
)
from tests.base_model.build import feed, open_slot, relative_error

CONFIG: V4Config = replace(preset("v4-tiny"), vocab_size=96, hc_sinkhorn_iters=4)


def stirred(config: V4Config, seed: int = 0) -> V4Network:
    """A network none of whose tensors is at its start."""
    network = V4Network(config)
    initialise(network, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
        for name, buffer in network.named_buffers():
            if name.endswith("gate.bias"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=draws)
    fill_hash_tables(network, torch.randint(0, 50, (config.vocab_size,), generator=draws))
    return network.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=draws)


def package_logits(config: V4Config, network: V4Network, ids: torch.Tensor) -> torch.Tensor:
    weights = official_tensors(network)
    model = V4Model(config, DictSource(weights), DictExperts(weights), dtype=torch.float32)
    cache = model.new_cache()
    return feed(model, cache, open_slot(cache), ids.tolist())


@pytest.mark.parametrize(
    ("indexer", "length"),
    [
        ("off", 1),
        ("off", 75),
        ("select", 7),
        ("select", 16),
        ("select", 75),
        pytest.param("off", 7, marks=pytest.mark.slow),
        pytest.param("off", 16, marks=pytest.mark.slow),
        pytest.param("select", 1, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_package(length, indexer):
    # With "off" the network attends to every entry, as the package does if the indexer keeps all.
    config = CONFIG if indexer == "select" else replace(CONFIG, index_topk=64)
    network, ids = stirred(config), tokens(2, length)
    with torch.no_grad():
        streams = network(ids, Notes(indexer=indexer)).streams
        ours = network.logits(streams).view(2, length, -1)
    for row in range(2):
        assert relative_error(ours[row], package_logits(config, network, ids[row])) < 1e-4


def test_names_and_shapes_are_those_of_a_checkpoint():
    expected = expected_tensors(CONFIG)
    found = official_tensors(V4Network(CONFIG))
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        k: spec.shape for k, spec in expected.items()
    }
    tables = [k for k, spec in expected.items() if spec.storage is Storage.I64]
    assert all(found[name].dtype == torch.int64 for name in tables)


def test_tensors_come_back_as_they_were():
    first, second = stirred(CONFIG, 1), stirred(CONFIG, 2)
    load_official(second, official_tensors(first))
    ids = tokens(1, 20)
    with torch.no_grad():
        one, other = (net.logits(net(ids, Notes()).streams) for net in (first, second))
    assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="no tensor"):
        load_official(second, {})


def test_every_parameter_gets_a_gradient_that_a_difference_confirms():
    """Indexers learn by their own loss alone, so the sum of both losses reaches everything."""
    network = stirred(CONFIG, 3).double().train()
    ids, labels = tokens(2, 24), tokens(2, 24, 1)
    bias = {id(p) for n, p in network.named_parameters() if ".indexer." in n}

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        notes = Notes(indexer="learn")
        return network.loss(ids, labels, notes), torch.stack(notes.index).sum()

    text, index = losses()
    text.backward(retain_graph=True)
    assert all((p.grad is None) == (id(p) in bias) for p in network.parameters())
    others = [p.grad.clone() for p in network.parameters() if id(p) not in bias]
    index.backward()
    kept = [p.grad for p in network.parameters() if id(p) not in bias]
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())

    draws = torch.Generator().manual_seed(4)
    step = [1e-6 * torch.randn(p.shape, generator=draws).double() for p in network.parameters()]
    slope = sum(float((p.grad * s).sum()) for p, s in zip(network.parameters(), step, strict=True))

    def moved(sign: int) -> float:
        with torch.no_grad():
            for p, s in zip(network.parameters(), step, strict=True):
                p += sign * s
            # The indexer's target and inputs are held fixed, so only its own tensors count there.
            text, _ = losses()
            for p, s in zip(network.parameters(), step, strict=True):
                p -= sign * s
        return float(text)

    only_text = sum(
        float((p.grad * s).sum())
        for p, s in zip(network.parameters(), step, strict=True)
        if id(p) not in bias
    )
    assert (moved(1) - moved(-1)) / 2 == pytest.approx(only_text, rel=1e-4)
    assert slope != only_text


def test_sinkhorn_has_the_gradient_of_its_steps():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.sinkhorn(x, 5, 1e-2), (logits,))
    c = ops.sinkhorn(logits, 20, 1e-6)
    assert torch.allclose(c.sum(1), torch.ones(5, 4, dtype=torch.float64), atol=1e-5)


def test_streams_are_read_and_written_with_the_gradients_of_their_formulas():
    draws = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64, requires_grad=True)

    streams, y, post, comb, fn = (
        numbers(3, 4, 5),
        numbers(3, 5),
        numbers(3, 4),
        numbers(3, 4, 4),
        numbers(7, 20),
    )
    expected = post[:, :, None] * y[:, None] + torch.einsum("njk,njd->nkd", comb, streams)
    assert torch.allclose(ops.write_streams(streams, y, post, comb), expected)
    assert torch.autograd.gradcheck(ops.write_streams, (streams, y, post, comb))
    normed = F.rms_norm(streams.flatten(1), (20,), eps=1e-2)
    assert torch.allclose(ops.project_streams(streams, fn, 1e-2), normed @ fn.T)
    assert torch.autograd.gradcheck(lambda s, f: ops.project_streams(s, f, 1e-2), (streams, fn))


def test_turning_has_the_gradient_of_turning_back():
    draws = torch.Generator().manual_seed(0)
    angles = torch.rand(3, 2, generator=draws, dtype=torch.float64)
    turns = torch.complex(angles.cos(), angles.sin())
    for shape in ((3, 6), (3, 2, 6)):
        x = torch.randn(shape, generator=draws, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: ops.turn(x, turns), (x,))
        assert torch.allclose(ops.turn(ops.turn(x, turns), turns.conj()), x)


def test_the_loss_of_text_has_the_gradient_of_cross_entropy(monkeypatch):
    monkeypatch.setattr(ops, "_LOSS_ROWS", 4)  # so that 10 rows take three parts
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=draws, requires_grad=True)
    head = torch.randn(9, 6, generator=draws, requires_grad=True)
    labels = torch.randint(0, 9, (10,), generator=draws)
    (3 * ops.text_loss(hidden, head, labels)).backward()
    found = [hidden.grad.clone(), head.grad.clone()]
    hidden.grad = head.grad = None
    expected = F.cross_entropy(F.linear(hidden, head), labels)
    (3 * expected).backward()
    assert ops.text_loss(hidden, head, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, [hidden.grad, head.grad])


def test_attention_has_the_gradient_of_its_formula():
    draws = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64, requires_grad=True)

    query, keys, sink = numbers(4, 3, 2, 5), numbers(4, 6, 5), numbers(2)
    seen = torch.rand(2, 3, 6, generator=draws) > 0.3
    bias = torch.zeros(2, 3, 6, dtype=torch.float64).masked_fill_(~seen, -torch.inf)

    def run(query, keys, sink):
        return ops.attend(query, keys, sink, bias)[0]

    assert torch.autograd.gradcheck(run, (query, keys, sink))
    scores = (
        torch.einsum("grhc,gtc->grht", query, keys) * 5**-0.5 + bias.repeat(2, 1, 1)[:, :, None]
    )
    law = torch.cat((scores, sink[:, None].expand(4, 3, 2, 1)), -1).softmax(-1)[..., :-1]
    assert torch.allclose(run(query, keys, sink), torch.einsum("grht,gtc->grhc", law, keys))


def test_experts_have_the_gradient_of_one_after_the_other():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 6, generator=draws, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3], [0, 1], [3, 0], [1, 0], [0, 3]])

    def run(x, weight):
        dispatch = ops.Dispatch.of(chosen, 4)
        rows = ops.select_rows(x, dispatch)
        return ops.join_rows(ops.grouped_linear(rows, weight, dispatch.bounds), dispatch)

    expected = torch.stack(
        [sum(weight[e] @ row for e in c) for row, c in zip(x, chosen, strict=True)]
    )
    assert torch.allclose(run(x, weight), expected)
    assert torch.autograd.gradcheck(run, (x, weight))
    assert ops.Dispatch.of(chosen, 4).counts == [7, 6, 0, 5]


def test_rounded_experts_are_what_packing_holds_and_gradients_reach_the_unrounded():
    from dspark.base_model.fp4 import quantise_fp4
    from dspark.base_model.stored import StoredWeight

    network, ids = stirred(CONFIG, 5), tokens(1, 12)
    before = network.layers[0].ffn.experts.w2.detach().clone()
    packed = StoredWeight(*quantise_fp4(before[1])).dequantise(torch.float32)
    with rounded_experts(network):
        assert torch.equal(network.layers[0].ffn.experts.w2[1], packed)
        loss = network.loss(ids, ids, Notes())
        loss.backward()
    assert torch.equal(network.layers[0].ffn.experts.w2, before)
    assert network.layers[0].ffn.experts.w2.grad.abs().max() > 0
    assert not torch.equal(before[1], packed)
    assert (
        loss.item() != F.cross_entropy(network.logits(network(ids, Notes()).streams), ids[0]).item()
    )


def test_hash_tables_give_experts_equal_shares():
    network = V4Network(CONFIG)
    counts = (1e4 / torch.arange(1, CONFIG.vocab_size + 1) ** 0.5).long()
    fill_hash_tables(network, counts)
    tables = [network.layers[i].ffn.gate.tid2eid for i in range(CONFIG.num_hash_layers)]
    for table in tables:
        assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in table.tolist())
        load = torch.zeros(CONFIG.n_routed_experts).index_add_(
            0, table.flatten(), counts.repeat_interleave(CONFIG.num_experts_per_tok).float()
        )
        assert load.max() < 1.05 * load.mean()
    assert not torch.equal(tables[0], tables[1])
