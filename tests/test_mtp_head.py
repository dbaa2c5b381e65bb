"""Sequential heads, the confidence head and reduced vocabularies."""

from __future__ import annotations

import pytest
import torch

from dspark.errors import ConfigError, ShapeError
from dspark.mtp_head import (
    ConfidenceHead,
    DraftVocab,
    GatedMarkovHead,
    MarkovHead,
    RNNHead,
    build_head,
    few_rows,
)

V, DRAFT_V, RANK, HIDDEN = 20, 12, 6, 10
KINDS = ["vanilla", "gated", "rnn"]


def make(kind: str, seed: int = 0) -> MarkovHead:
    torch.manual_seed(seed)
    head = build_head(kind, vocab_size=V, draft_vocab_size=DRAFT_V, rank=RANK, hidden_size=HIDDEN)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def bias_by_hand(head, branch, hiddens):
    """Bias after a branch of tokens, one vector at a time."""
    w1, w2 = head.markov_w1.weight, head.markov_w2.weight
    last, hidden = w1[branch[-1]], hiddens[-1]
    if isinstance(head, GatedMarkovHead):
        gate = head.gate_proj.weight @ torch.cat([hidden, last]) + head.gate_proj.bias
        return w2 @ (last * torch.sigmoid(gate))
    if not isinstance(head, RNNHead):
        return w2 @ last
    state = torch.zeros(RANK)
    for token, seen in zip(branch, hiddens, strict=True):
        joint = head.joint_proj.weight @ torch.cat([state, w1[token], seen]) + head.joint_proj.bias
        gate, candidate, output = (joint[i * RANK : (i + 1) * RANK] for i in range(3))
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
    return w2 @ torch.tanh(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_many_branches_at_once_equal_each_by_hand(kind, rows):
    head = make(kind)
    branches, hiddens = torch.randint(V, (rows, 4)), torch.randn(rows, 4, HIDDEN)
    state = head.start(hiddens[:, 0])
    for position in range(4):
        bias, state = head.step(state, branches[:, position], hiddens[:, position])
        for row in range(rows):
            upto = position + 1
            expected = bias_by_hand(head, branches[row, :upto].tolist(), hiddens[row, :upto])
            torch.testing.assert_close(bias[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_biases_of_drafting(kind):
    head = make(kind)
    tokens, hidden = torch.randint(V, (5, 4)), torch.randn(5, 4, HIDDEN)
    unrolled, state = head.unroll(tokens, hidden), head.start(hidden[:, 0])
    for position in range(4):
        bias, state = head.step(state, tokens[:, position], hidden[:, position])
        torch.testing.assert_close(unrolled[:, position], bias)
    unrolled.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_not_changed_by_the_steps_taken_from_it(kind):
    """Branches share the state of their parent."""
    head = make(kind)
    hidden = torch.randn(2, HIDDEN)
    _, state = head.step(head.start(hidden), torch.tensor([1, 2]), hidden)
    before = state.clone()
    first, _ = head.step(state, torch.tensor([3, 4]), hidden)
    head.step(state, torch.tensor([5, 6]), hidden)
    again, _ = head.step(state, torch.tensor([3, 4]), hidden)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_no_rank_is_no_head_and_bad_names_are_refused():
    sizes = {"vocab_size": V, "draft_vocab_size": V, "hidden_size": HIDDEN}
    assert build_head("vanilla", rank=0, **sizes) is None
    with pytest.raises(ConfigError, match="gru"):
        build_head("gru", rank=1, **sizes)
    with pytest.raises(ConfigError, match="-1"):
        build_head("vanilla", rank=-1, **sizes)


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("has_bias", [True, False])
def test_confidence_is_a_product_with_hidden_state_and_w1(rank, has_bias):
    head = ConfidenceHead(HIDDEN, rank, has_bias=has_bias)
    hidden, previous = torch.randn(3, HIDDEN), torch.randn(3, RANK)
    inputs = torch.cat([hidden, previous], dim=1) if rank else hidden
    expected = inputs @ head.proj.weight[0] + (head.proj.bias if has_bias else 0)
    torch.testing.assert_close(head(hidden, previous), expected)
    if rank:
        with pytest.raises(ShapeError):
            head(hidden)


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_for_few_rows_is_a_product(rows, dtype):
    x, weight = torch.randn(rows, 8).to(dtype), torch.randn(30, 8).to(dtype)
    torch.testing.assert_close(few_rows(x, weight), torch.nn.functional.linear(x, weight))


def test_a_reduced_vocabulary_widens_and_reduces():
    vocab = DraftVocab.build(V, [0, 3, 4, 19])
    logits = torch.arange(8.0).view(2, 4)
    wide = vocab.widen(logits)
    assert wide.shape == (2, V)
    torch.testing.assert_close(wide[:, [0, 3, 4, 19]], logits)
    assert int(torch.isinf(wide).sum()) == 2 * (V - 4)
    assert vocab.reduce(torch.tensor([3, 19, 1])).tolist() == [1, 3, -1]
    with pytest.raises(ShapeError, match="5"):
        vocab.widen(torch.zeros(1, 5))


def test_a_whole_vocabulary_leaves_logits_alone():
    vocab, logits = DraftVocab.build(V, None), torch.randn(2, V)
    assert vocab.widen(logits) is logits
    assert vocab.draft_size == V
    assert vocab.reduce(torch.tensor([7])).tolist() == [7]


@pytest.mark.parametrize("ids", [[], [3, 2], [2, 2], [-1, 3], [0, V], [[1, 2]]])
def test_ids_outside_a_vocabulary_are_refused(ids):
    with pytest.raises(ConfigError, match="ascend"):
        DraftVocab.build(V, ids)
