"""Packed blocks compute what drafting computes, block by block."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dspark.draft.backbone import attend_rows
from dspark.training.blocks import BlockTraining
from dspark.training.packing import pack, position_weights
from dspark.training.recipe import LossSection
from tests.draft.dspark_models import HEADS, STYLES
from tests.training.toys import make_features, make_sample, make_trainable


def visible(window, anchor: int, slots: int) -> torch.Tensor:
    """Mask [S, anchor + S] written from the definition of a window."""
    mask = torch.ones(slots, anchor + slots, dtype=torch.bool)
    if window is None:
        return mask
    for slot in range(slots):
        for column in range(anchor):
            end = anchor + slot + 1 if window.moves else anchor
            mask[slot, column] = column >= end - window.size
        for other in range(slots):
            mask[slot, anchor + other] = not window.is_causal or other <= slot
    return mask


def one_block(module, sample, features, anchor: int) -> torch.Tensor:
    """Hidden states [S, D] of one block on its own."""
    slots = module.config.block_size
    context = module.context(module.combine(features.hidden[:anchor]), torch.arange(anchor))
    tokens = torch.full((slots,), module.config.mask_token_id)
    tokens[0] = int(sample.tokens[anchor])

    def attend(layer, queries, keys, values):
        key, value = context[layer]
        mask = visible(module.windows[layer], anchor, slots)
        keys = torch.cat([key, keys]).transpose(0, 1)
        values = torch.cat([value, values]).transpose(0, 1)
        return attend_rows(queries, keys, values, mask)

    return module.block(module.embed(tokens), torch.arange(anchor, anchor + slots), attend)


def packed_batch(module, teacher, anchors_of):
    samples = [make_sample(0, 5, 30), make_sample(1, 9, 17), make_sample(2, 2, 44)]
    features = [make_features(sample, teacher) for sample in samples]
    chosen = [np.array(anchors_of(sample)) for sample in samples]
    weights = position_weights(module.config.gamma, None)
    pairs = list(zip(samples, chosen, strict=True))
    packed = pack(pairs, features, module.config, weights, device=torch.device("cpu"))
    return samples, features, chosen, packed


@pytest.mark.parametrize(
    ("style", "anchor_predicts"),
    [*((style, True) for style in STYLES), (next(iter(STYLES)), False)],
)
def test_a_packed_block_is_the_block_alone(style, anchor_predicts):
    module, teacher = make_trainable(style, sample_from_anchor=anchor_predicts)
    network = BlockTraining(module, teacher, LossSection())
    samples, features, chosen, packed = packed_batch(
        module, teacher, lambda s: range(s.start, s.length - 1, 5)
    )
    with torch.no_grad():
        together = network.hidden(packed)
        row = 0
        for sample, own, anchors in zip(samples, features, chosen, strict=True):
            for anchor in anchors:
                alone = one_block(module, sample, own, int(anchor))
                torch.testing.assert_close(together[row], alone, rtol=2e-4, atol=2e-5)
                row += 1
    assert row == together.shape[0] > 15


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("anchor_predicts", [True, False])
def test_logits_are_those_of_drafting_along_the_text(head, anchor_predicts):
    """Base logits and the sequential head, stepped as `DSparkDrafter` steps it."""
    module, teacher = make_trainable(
        head=head, sample_from_anchor=anchor_predicts, ids=range(0, 96, 3)
    )
    network = BlockTraining(module, teacher, LossSection())
    samples, features, chosen, packed = packed_batch(
        module, teacher, lambda s: [s.start, s.start + 3, s.length - 2]
    )
    config, markov = module.config, module.markov_head
    with torch.no_grad():
        logits = network.logits(network.hidden(packed), packed.previous)
        row = 0
        for sample, own, anchors in zip(samples, features, chosen, strict=True):
            for anchor in anchors.tolist():
                hidden = one_block(module, sample, own, anchor)
                base = module.base_logits(hidden[config.first_slot :])
                state = None if markov is None else markov.start(hidden[:1])
                start = torch.tensor([int(sample.tokens[anchor])])
                if markov is not None and config.first_slot:
                    _, state = markov.latent(state, markov.embed(start), hidden[:1])
                for depth in range(min(config.gamma, sample.length - 1 - anchor)):
                    expected = base[depth]
                    if markov is not None:
                        token = torch.tensor([int(sample.tokens[anchor + depth])])
                        slot = depth + config.first_slot
                        bias, state = markov.step(state, token, hidden[slot : slot + 1])
                        expected = expected + bias[0]
                    torch.testing.assert_close(logits[row, depth], expected, rtol=2e-4, atol=2e-5)
                row += 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("style", ["qwen3", "sliding moving"])
def test_gradients_are_those_of_the_written_out_loss(head, style, monkeypatch):
    """Parts and hand-written gradients against autograd over everything at once."""
    monkeypatch.setattr("dspark.training.network._PART_BYTES", 4 * 32 * 5 * 4)  # four blocks
    ids = range(0, 96, 3)
    module, teacher = make_trainable(style, head, ids=ids)
    loss = LossSection(temperature=1.3)
    network = BlockTraining(module, teacher, loss)
    *_, packed = packed_batch(module, teacher, lambda s: range(s.start, s.length - 1, 2))
    scale = 1 / float(packed.weights.sum())
    packed_total = torch.logsumexp(teacher.unembed(packed.final) / 1.3, dim=-1)
    packed = dataclasses.replace(packed, total=packed_total)
    value, _ = network(packed, scale)
    value.backward()
    found = {name: p.grad.to_dense().clone() for name, p in module.named_parameters()}
    module.zero_grad()

    hidden = network.hidden(packed)
    draft = torch.softmax(network.logits(hidden, packed.previous) / 1.3, dim=-1)
    target = torch.softmax(teacher.unembed(packed.final) / 1.3, dim=-1)[packed.teacher]
    wide = torch.zeros_like(target)
    wide[..., list(ids)] = draft
    l1 = (wide - target).abs().sum(-1)
    inside = packed.labels % 3 == 0
    ce = -(wide.gather(-1, packed.labels[..., None])[..., 0].clamp_min(1e-30).log()) * inside
    confidence = module.confidence(hidden.flatten(0, 1), packed.previous.flatten())
    chance = (1 - l1 / 2).detach()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        confidence.view_as(chance), chance, reduction="none"
    )
    expected = ((0.1 * ce + 0.9 * l1 + bce) * packed.weights).sum() * scale
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name, parameter in module.named_parameters():
        wanted = parameter.grad.to_dense()
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6, msg=name)
        assert float(wanted.abs().max()) > 0, name
