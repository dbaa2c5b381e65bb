"""EAGLE-3 and MTP: what is trained is what the drafter runs, with the loss as it is defined."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from dspark.draft.base import DraftContext
from dspark.draft.eagle3 import Eagle3Drafter
from dspark.draft.eagle3_format import load_eagle3
from dspark.draft.eagle3_module import Eagle3Config, Eagle3Module
from dspark.draft.grow import GrowthConfig
from dspark.request import Rule, SamplingParams
from dspark.training.kinds import UnrolledDraft
from dspark.training.metrics import figures_of
from dspark.training.packing import pack, position_weights, total_weight
from dspark.training.progress import SilentReporter
from dspark.training.recipe import LossSection
from dspark.training.samples import Sample
from dspark.training.setup import prepare
from dspark.training.trainer import Trainer
from dspark.verify.noise import NoiseKey
from tests.draft.dspark_models import HIDDEN, VOCAB
from tests.draft.reference_eagle3 import Reference
from tests.training.oracle import Oracle
from tests.training.runs import KINDS, make_run
from tests.training.toys import ToyTeacher, make_features, make_sample

STEPS = 4
DECAY = 1 / math.log(2)  # weights 1, 1/2, ..., exact in float32
REDUCED = list(range(0, VOCAB, 3))
# With theta = 2 ** 8 and heads of 16 the rotary frequencies are powers of two, exact in float32.
SHAPE = {
    "hidden_size": HIDDEN,
    "target_hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "rope": {"rope_type": "default", "rope_theta": 256.0},
}
MODULES = {
    "eagle3": {"target_layers": (0, 1, 2), "qk_norm": True},
    "mtp": {"target_layers": (2,)},
    "mtp, own ends": {"target_layers": (2,), "has_embedding": True, "norm_output": True},
}
LAW = LossSection(ce=0.7, l1=0.4, labels="target", decay=DECAY, temperature=1.3)
TEXT = LossSection(ce=0.2, l1=0.8, labels="text", decay=DECAY)


class DoubleTeacher(ToyTeacher):
    """A toy teacher in float64."""

    def __init__(self):
        super().__init__()
        self.weight = self.weight.double()


def make_draft(name: str, ids: list[int] | None):
    """A random draft in float64 with its teacher."""
    teacher, options = DoubleTeacher(), MODULES[name]
    module = Eagle3Module(
        Eagle3Config(**SHAPE, **options, draft_vocab_size=VOCAB if ids is None else len(ids))
    ).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        mean, std = (0.0, 0.2) if parameter.ndim > 1 else (1.0, 0.2)
        torch.nn.init.normal_(parameter, mean=mean, std=std, generator=generator)
    rows = None
    if ids is not None:
        module.d2t.copy_(torch.tensor(ids) - torch.arange(len(ids)))
    if not module.config.has_embedding:
        rows = teacher.head_rows(None if ids is None else torch.tensor(ids))
        module.lm_head.weight.data.copy_(rows.weight)
    weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    if rows is not None:
        del module.lm_head
    return UnrolledDraft(module, rows, steps=STEPS, num_target_layers=4), teacher, weights


def batch(draft, teacher, loss: LossSection, anchors_of):
    samples = [make_sample(0, 3, 11), make_sample(1, 5, 4), make_sample(2, 1, 9)]
    width = len(draft.target_layers) * HIDDEN
    features = []
    for sample in samples:
        own = make_features(sample, ToyTeacher())
        final = own.final.double()
        total = torch.logsumexp(teacher.unembed(final) / loss.temperature, dim=-1)
        hidden = own.hidden[:, -width:].double()
        features.append(dataclasses.replace(own, hidden=hidden, final=final, total=total))
    chosen = [np.array(anchors_of(sample)) for sample in samples]
    pairs = list(zip(samples, chosen, strict=True))
    weights = position_weights(STEPS, loss.decay)
    packed = pack(pairs, features, draft.shape, weights, device=torch.device("cpu"))
    scale = 1 / total_weight(pairs, STEPS, weights)
    return pairs, features, packed, scale


def slow_blocks(draft, teacher, weights, pairs, features):
    """What the oracle wants of every anchor, from the reference, one position at a time."""
    config = draft.module.config
    ids = draft.module.target_ids()
    lent = None if config.has_embedding else teacher.embed
    reference = Reference(config, weights, lent)
    blocks = []
    for (sample, anchors), own in zip(pairs, features, strict=True):
        tokens = sample.tokens.tolist()
        parts = own.hidden.split(HIDDEN, dim=-1)
        hidden = dict(zip(config.target_layers, parts, strict=True))
        for anchor in anchors.tolist():
            positions = []
            for k in range(1, min(STEPS, sample.length - 1 - anchor) + 1):
                row = reference.logits(
                    tokens[: anchor + 1], hidden, tokens[anchor + 1 : anchor + k]
                )
                drafted = row if ids is None else row[ids]
                place = anchor + k - 1 - sample.start
                target = teacher.unembed(own.final[place])
                positions.append((drafted.tolist(), target.tolist(), tokens[anchor + k], None))
            blocks.append((positions, STEPS))
    return blocks


@pytest.mark.parametrize(
    ("name", "ids", "loss"),
    [
        ("eagle3", REDUCED, LAW),
        ("eagle3", None, TEXT),
        ("mtp", None, LAW),
        ("mtp, own ends", REDUCED, TEXT),
    ],
    ids=["eagle3, law", "eagle3, text", "mtp, law", "mtp, text"],
)
def test_loss_and_figures_are_those_of_the_definition(name, ids, loss):
    """All in float64: the packed network against loops over positions, heads and tokens."""
    draft, teacher, weights = make_draft(name, ids)
    pairs, features, packed, scale = batch(
        draft, teacher, loss, lambda s: range(s.start, s.length - 1, 3)
    )
    network = draft.training(teacher, loss)
    with torch.no_grad():
        value, sums = network(packed, scale)
    figures = figures_of(sums, (loss.ce, loss.l1, 0.0))
    oracle = Oracle(
        range(VOCAB) if ids is None else ids,
        terms=(loss.ce, loss.l1, 0.0),
        decay=loss.decay,
        temperature=loss.temperature,
        labels=loss.labels,
    )
    expected = oracle.evaluate(slow_blocks(draft, teacher, weights, pairs, features))
    assert figures.positions > 12
    assert float(value) == pytest.approx(expected["loss"], abs=1e-9)
    for key in ("loss", "tau_greedy", "tau_sampling", "acceptance", "agreement", "conditional"):
        assert getattr(figures, key) == pytest.approx(expected[key], abs=1e-9), key


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_written_out_loss(name, monkeypatch):
    """Parts and hand-written gradients against autograd over everything at once."""
    monkeypatch.setattr("dspark.training.network._PART_BYTES", 4 * len(REDUCED) * STEPS * 4)
    draft, teacher, _ = make_draft(name, REDUCED)
    _, _, packed, scale = batch(draft, teacher, LAW, lambda s: range(s.start, s.length - 1))
    network = draft.training(teacher, LAW)
    value, _ = network(packed, scale)
    value.backward()
    found = {key: p.grad.clone() for key, p in draft.module.named_parameters()}
    draft.module.zero_grad()

    logits = network.logits(network.hidden(packed), packed.previous) / LAW.temperature
    target = torch.softmax(teacher.unembed(packed.final) / LAW.temperature, -1)[packed.teacher]
    inside = target[..., REDUCED]
    outside = 1 - inside.sum(-1)
    l1 = (torch.softmax(logits, -1) - inside).abs().sum(-1) + outside
    shares = inside / inside.sum(-1, keepdim=True)
    is_inside = torch.isin(target.argmax(-1), torch.tensor(REDUCED))
    ce = -(shares * torch.log_softmax(logits, -1)).sum(-1) * is_inside
    expected = ((LAW.ce * ce + LAW.l1 * l1) * packed.weights).sum() * scale
    expected.backward()
    torch.testing.assert_close(value, expected)
    for key, parameter in draft.module.named_parameters():
        wanted = parameter.grad
        torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-7, msg=key)
        assert float(wanted.abs().max()) > 0, key


# -- what a run leaves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owned", "kind"),
    [
        (False, "mtp"),
        (True, "eagle3"),
        pytest.param(False, "eagle3", marks=pytest.mark.slow),
        pytest.param(True, "mtp", marks=pytest.mark.slow),
    ],
)
def test_a_published_draft_proposes_what_the_network_says(tmp_path, kind, owned):
    """A drafted path with its laws, against the network run on a text that goes on with it."""
    recipe = make_run(
        tmp_path, **KINDS[kind], draft_storage="float32", draft_owns_head=owned, run_steps=2
    )
    setup = prepare(recipe, device="cpu")
    Trainer(setup, tmp_path / "out", reporter=SilentReporter()).run()
    drafter = load_eagle3(tmp_path / "out" / "last", setup.target, config=GrowthConfig(width=1))
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.capture == setup.draft.target_layers == ((3,) if kind == "mtp" else (0, 2))
    sample = setup.samples.train[0]
    anchor = sample.start + 2
    (own,) = setup.source.get([sample])
    tokens = sample.tokens[: anchor + 1].tolist()
    parts = own.hidden[:anchor].split(64, dim=-1)
    context = DraftContext(
        request_id=0,
        tokens=tokens,
        prompt_length=sample.start,
        params=SamplingParams(temperature=1.0),
        rule=Rule.REJECTION,
        noise=NoiseKey(11),
        round=1,
        budget=3,
        depth=3,
        width=1,
        features=dict(zip(drafter.capture, parts, strict=True)),
    )
    proposal = drafter.propose([context])[0]
    path = proposal.tree.path_tokens(2)

    text = np.array([*tokens, *path, 0], dtype=np.int64)
    followed = Sample(0, text, 1, "drafted")
    width = own.hidden.shape[1]
    filler = torch.zeros(len(text) - 1, width)
    filler[:anchor] = own.hidden[:anchor]
    final = torch.zeros(len(text) - 2, 64)
    made = dataclasses.replace(
        own, hidden=filler, final=final, total=final[:, 0], best=final[:, 0].long()
    )
    pairs = [(followed, np.array([anchor]))]
    weights = position_weights(3, None)
    packed = pack(pairs, [made], setup.draft.shape, weights, device=torch.device("cpu"))
    network = setup.draft.training(setup.head, recipe.loss)
    with torch.no_grad():
        logits = network.logits(network.hidden(packed), packed.previous)[0]
    ids = setup.module.target_ids()
    laws = torch.zeros(3, 96).index_copy_(1, ids, torch.softmax(logits, -1))
    for depth in range(3):
        law = proposal.laws[proposal.law_of[depth]].float()
        torch.testing.assert_close(law, laws[depth], rtol=1e-4, atol=1e-6)
