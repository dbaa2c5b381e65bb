"""Muon: its updates are those of torch's, but for the precision of the products."""

import pytest
import torch
from torch import nn

from dspark.training.muon import Muon


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_updates_are_torchs(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    mine, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    own = Muon([mine], **settings)
    reference = torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **settings)
    for gradient in gradients:
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        own.step()
        reference.step()
        own.zero_grad()
    change, expected = mine.detach() - start, other.detach() - start
    assert (change - expected).norm() < 0.02 * expected.norm()  # torch's are in bfloat16


def test_updates_are_nearly_orthogonal():
    torch.manual_seed(1)
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 64) @ torch.diag(torch.logspace(0, -1, 64))
    Muon([weight], lr=1.0).step()
    values = torch.linalg.svdvals(weight.detach()) / (0.2 * 64**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_parameters_without_gradient_stay():
    weight = nn.Parameter(torch.ones(4, 4))
    Muon([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))
