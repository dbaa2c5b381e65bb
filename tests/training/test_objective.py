"""Losses and gradients against the oracle, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dspark.training.metrics import block_sums, figures_of
from dspark.training.objective import LawRows, confidence_rows, law_rows
from dspark.training.recipe import LossSection
from tests.training.oracle import Oracle

V, GAMMA = 23, 4
VOCABULARIES = {"whole": list(range(V)), "reduced": [0, 3, 4, 7, 8, 11, 15, 16, 20, 22]}


class Case:
    """Random blocks, some of them cut short."""

    def __init__(
        self, vocabulary: str, temperature: float = 1.0, labels: str = "text", seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = VOCABULARIES[vocabulary]
        self.temperature = temperature
        self.lengths = [GAMMA, GAMMA, 1, 2, GAMMA, 3, GAMMA, GAMMA, GAMMA]
        shape = (len(self.lengths), GAMMA)
        double = {"generator": generator, "dtype": torch.float64}
        self.target = torch.randn(*shape, V, **double) * 2
        self.target[..., self.ids] += 1.5
        self.logits = 0.8 * self.target[..., self.ids] + 0.7 * torch.randn(
            *shape, len(self.ids), **double
        )
        self.confidence = torch.randn(*shape, **double)
        self.labels = torch.randint(0, V, shape, generator=generator)
        self.loss = LossSection(
            ce=0.1, l1=0.9, confidence=1.0, temperature=temperature, labels=labels
        )
        depth = torch.arange(GAMMA, dtype=torch.float64)
        self.weights = torch.exp(-depth / 4.0).repeat(len(self.lengths), 1)
        for row, length in enumerate(self.lengths):
            self.weights[row, length:] = 0

    def rows(self) -> LawRows:
        place = torch.full((V,), -1)
        place[self.ids] = torch.arange(len(self.ids))
        law = torch.softmax(self.target / self.temperature, -1).flatten(0, 1)
        inside = law[:, self.ids]
        best = place[self.target.argmax(-1).flatten()]
        label = place[self.labels.flatten()]
        return LawRows(inside, (1 - inside.sum(-1)).clamp_min(0), label, best)

    def run(self, logits=None):
        own = (self.logits if logits is None else logits).flatten(0, 1).clone()
        return law_rows(own, self.rows(), self.weights.flatten(), self.loss)

    def oracle(self):
        blocks = []
        for row, length in enumerate(self.lengths):
            positions = [
                (
                    self.logits[row, k].tolist(),
                    self.target[row, k].tolist(),
                    int(self.labels[row, k]),
                    float(self.confidence[row, k]),
                )
                for k in range(length)
            ]
            blocks.append((positions, GAMMA))
        options = {"temperature": self.temperature, "labels": self.loss.labels}
        return Oracle(self.ids, decay=4.0, **options).evaluate(blocks)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("labels", ["text", "target"])
def test_losses_and_figures_are_the_oracle_s(vocabulary, temperature, labels):
    case = Case(vocabulary, temperature, labels)
    rows = case.run()
    bce = confidence_rows(case.confidence.flatten(), rows.acceptance)
    shape = case.weights.shape
    losses = tuple(item.view(shape) for item in (rows.ce, rows.l1, bce))
    sums = block_sums(case.weights, rows.agrees.view(shape), rows.acceptance.view(shape), losses)
    figures = figures_of(sums, (0.1, 0.9, 1.0))
    expected = case.oracle()
    assert figures.loss == pytest.approx(expected["loss"], abs=1e-9)
    assert figures.tau_greedy == pytest.approx(expected["tau_greedy"], abs=1e-9)
    assert figures.tau_sampling == pytest.approx(expected["tau_sampling"], abs=1e-9)
    assert figures.tau_greedy > 1.2
    for name in ("acceptance", "agreement", "conditional"):
        assert getattr(figures, name) == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    "terms", [{"ce": 0.0, "l1": 1.0}, {"ce": 1.0, "l1": 0.0}, {"ce": 0.1, "l1": 0.9}]
)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("labels", ["text", "target"])
def test_the_gradient_is_that_of_finite_differences(vocabulary, terms, temperature, labels):
    case = Case(vocabulary, temperature)
    case.loss = LossSection(**terms, temperature=temperature, labels=labels)
    gradient = case.run().gradient.view(case.logits.shape)
    rng = torch.Generator().manual_seed(1)
    step = 1e-6
    for _ in range(15):
        row = int(torch.randint(0, len(case.lengths), (), generator=rng))
        k = int(torch.randint(0, GAMMA, (), generator=rng))
        column = int(torch.randint(0, len(case.ids), (), generator=rng))
        sides = []
        for sign in (1, -1):
            moved = case.logits.clone()
            moved[row, k, column] += sign * step
            rows = case.run(moved)
            value = case.loss.ce * rows.ce + case.loss.l1 * rows.l1
            sides.append(float((value * case.weights.flatten()).sum()))
        difference = (sides[0] - sides[1]) / (2 * step)
        assert float(gradient[row, k, column]) == pytest.approx(difference, abs=2e-7)


def test_the_confidence_learns_acceptance_and_does_not_move_it():
    acceptance = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([math.log(0.3 / 0.7), 0.0], dtype=torch.float64, requires_grad=True)
    confidence_rows(logits, acceptance).sum().backward()
    assert acceptance.grad is None
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, -0.4], dtype=torch.float64))


def test_the_cross_entropy_with_the_law_is_least_at_the_law():
    case = Case("reduced", labels="target")
    case.loss = LossSection(ce=1.0, l1=0.0, labels="target")
    rows = case.run(case.target[..., case.ids])
    torch.testing.assert_close(rows.gradient, torch.zeros_like(rows.gradient))
    skipped = rows.ce == 0
    assert torch.equal(skipped, case.rows().best < 0)
    assert 0 < int(skipped.sum()) < len(skipped)


def test_a_law_wholly_outside_the_vocabulary_costs_two():
    case = Case("reduced")
    case.target[:] = -50.0
    case.target[..., 1] = 50.0
    rows = case.run()
    torch.testing.assert_close(rows.l1, torch.full_like(rows.l1, 2.0))
    assert not rows.agrees.any()
