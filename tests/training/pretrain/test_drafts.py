"""Draft modules that are trained compute what the package's drafters compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark.base_model.config import V4Config
from dspark.base_model.dspark_module import V4DSparkModule
from dspark.base_model.expert_store import DictExperts
from dspark.base_model.model import V4Model
from dspark.base_model.mtp import MTPModule
from dspark.base_model.names import expected_tensors
from dspark.base_model.weights import DictSource
from dspark.errors import ConfigError
from dspark.target import BatchPart, TokenBatch
from dspark.training.pretrain.attention import Notes
from dspark.training.pretrain.draft_loss import DraftRows, depth_weights, draft_loss
from dspark.training.pretrain.draft_trainer import DraftTraining
from dspark.training.pretrain.drafts import DSparkNetwork, MTPNetwork
from dspark.training.pretrain.legs import Leg, run_leg
from dspark.training.pretrain.network import V4Network, initialise, official_tensors
from dspark.training.pretrain.settings import draft_config
from dspark.training.recipe import LossSection
from tests.base_model.build import relative_error
from tests.training.pretrain import toys

pytestmark = pytest.mark.slow  # trains

BASE: V4Config = toys.recipe().model


def stirred(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A module none of whose tensors is at its start."""
    initialise(module, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return module.eval()


def package(config: V4Config, network: V4Network, draft: torch.nn.Module) -> V4Model:
    weights = {**official_tensors(network), **official_tensors(draft)}
    assert {k: v.shape for k, v in weights.items()} == {
        k: spec.shape for k, spec in expected_tensors(config).items()
    }
    return V4Model(config, DictSource(weights), DictExperts(weights), dtype=torch.float32)


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, BASE.vocab_size, (1, length), generator=draws)


@pytest.mark.parametrize("anchor", [0, 1, 5, 8, 20, 29])
def test_dspark_laws_and_confidence_are_those_of_the_package(anchor):
    network, draft = stirred(V4Network(BASE), 0), stirred(DSparkNetwork(BASE), 1)
    module = V4DSparkModule(package(BASE, network, draft))
    text, slots = tokens(33), BASE.dspark_block_size
    captured = torch.randn(1, 32, 3 * BASE.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        anchors = torch.tensor([[anchor, 30]])
        out = draft(network.embed.weight, captured, text, anchors, Notes())
        bias = out.previous @ draft.markov_w2.T
        ours = network.head(out.normed)[:slots] + bias[:slots]
        sure = draft.confidence(out)[:slots]

        first = max(0, anchor - BASE.sliding_window)
        places = torch.arange(first, anchor)
        keys = module.context(module.combine(captured[0, first:anchor]), places)
        ids = torch.tensor([int(text[0, anchor]), *[BASE.dspark_noise_token_id] * (slots - 1)])

        def attend(stage, query, key, value):
            both = torch.cat((keys[stage][0], key)).transpose(0, 1)
            return module.attend(stage, query, both, both, None)

        hidden = module.block(module.embed(ids), anchor + torch.arange(slots), attend)
        before = text[0, anchor : anchor + slots]
        latent = module.markov_head.embed(before)
        theirs = module.base_logits(hidden) + module.markov_head.markov_w2(latent)
        assert relative_error(ours, theirs) < 1e-4
        assert relative_error(sure, module.confidence(hidden, before)) < 1e-4


@pytest.mark.parametrize("drafted_from", [0, 3, 11, 24])
def test_mtp_laws_are_those_of_the_package_at_every_step(drafted_from):
    """The package commits pairs 0 .. t and drafts behind them; row t of the network is the same."""
    config, depth, t = draft_config(BASE, "mtp"), 3, drafted_from
    network, draft = stirred(V4Network(BASE), 0), stirred(MTPNetwork(config), 1)
    module = MTPModule(package(config, network, draft))
    text, count = tokens(32), 27
    streams = torch.randn(
        count, config.hc_mult, config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        embedded = network.embed(text[:, 1 : count + depth])
        outputs = draft(embedded, streams, depth, Notes())
        ours = torch.stack([network.head(hidden[t]) for hidden in outputs])

    cache = module.new_cache()
    slot, _ = cache.open([])
    ids = text[0].tolist()

    def forward(drafted: list[int], inputs: torch.Tensor) -> torch.Tensor:
        cache.reserve(slot, len(drafted))
        start = cache.length(slot)
        places = start + np.arange(len(drafted))
        part = BatchPart(slot, drafted, places, list(range(-1, len(drafted) - 1)), [])
        return module.forward(TokenBatch.build([part]), inputs, cache)

    out = forward(ids[1 : t + 2], streams[: t + 1])
    cache.commit(slot, range(t + 1))
    theirs, inputs = [module.logits(out[-1:])[0]], out[-1:]
    for step in range(1, depth):
        out = forward(ids[t + 2 : t + 2 + step], inputs)
        theirs.append(module.logits(out[-1:])[0])
        inputs = torch.cat((inputs, out[-1:]))
    assert relative_error(ours, torch.stack(theirs)) < 1e-4


def test_the_draft_loss_is_its_formula_and_has_its_gradient(monkeypatch):
    from dspark.training.pretrain import draft_loss as module

    monkeypatch.setattr(module, "_ROWS", 4)
    draws = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    hidden, latent, w2 = (
        x.requires_grad_() for x in (numbers(10, 6), numbers(10, 3), numbers(9, 3))
    )
    head, teacher, labels = (
        numbers(9, 6),
        numbers(10, 6),
        torch.randint(0, 9, (10,), generator=draws),
    )
    weights = torch.rand(10, generator=draws, dtype=torch.float64)
    rows = DraftRows(head, teacher, labels, weights, LossSection(ce=0.3, l1=0.7))

    loss, acceptance = draft_loss(hidden, latent, w2, rows)
    law = (hidden @ head.T + latent @ w2.T).softmax(-1)
    l1 = (law - (teacher @ head.T).softmax(-1)).abs().sum(-1)
    ce = -law.gather(1, labels[:, None])[:, 0].log()
    expected = (weights * (0.3 * ce + 0.7 * l1)).sum()
    assert loss.item() == pytest.approx(expected.item())
    assert torch.allclose(acceptance, 1 - l1.detach() / 2)
    found = torch.autograd.grad(2 * loss, (hidden, latent, w2))
    wanted = torch.autograd.grad(2 * expected, (hidden, latent, w2))
    torch.testing.assert_close(found, wanted)


def test_weights_of_depths_fall_and_sum_to_one():
    weights = depth_weights(4, 2.0)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights[1] / weights[0]).item() == pytest.approx(np.exp(-0.5))


def frozen_target() -> V4Network:
    network = V4Network(BASE)
    initialise(network, 0)
    with torch.no_grad():
        network.head.weight.mul_(20)  # laws with a shape, so that there is something to learn
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_a_draft_comes_closer_to_its_target_which_stays_as_it_is(kind):
    target = frozen_target()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    section = replace(toys.recipe().dspark, steps=12, muon_lr=1e-2, adam_lr=1e-2)
    recipe = replace(toys.recipe(), dspark=section, mtp=section)
    training = DraftTraining(recipe, kind, target, toys.tokens())
    first = training.validate()["code"]
    losses = [training.advance()["loss"] for _ in range(12)]
    last = training.validate()["code"]
    assert len(first) == len(last) == training.depths == 3
    assert losses[-1] < 0.85 * losses[0]
    # This target mostly repeats its token, which an untrained draft does at depth 1 by itself.
    assert last[1] > first[1]
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_a_resumed_draft_equals_an_uninterrupted_one(kind, tmp_path):
    found = []
    for folder, stops in ((tmp_path / "a", [None]), (tmp_path / "b", [2, None])):
        for stop in stops:
            training = DraftTraining(toys.recipe(), kind, frozen_target(), toys.tokens())
            run_leg(training, folder, Leg(max_steps=stop), lambda _: None)
        found.append(training.tensors())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_recipe_without_the_draft_is_refused():
    with pytest.raises(ConfigError, match=r"no section \[mtp\]"):
        DraftTraining(replace(toys.recipe(), mtp=None), "mtp", frozen_target(), toys.tokens())
    with pytest.raises(ConfigError, match="no dspark_block_size"):
        draft_config(draft_config(BASE, "none"), "dspark")
