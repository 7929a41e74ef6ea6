"""MixtureOfSoftmaxes beside its formula."""

import pytest
import torch
from torch import nn

from fairseq_lrn.modules import MixtureOfSoftmaxes


def make():
    torch.manual_seed(1)
    return MixtureOfSoftmaxes(3, 2, nn.Linear(4, 7)).double().requires_grad_(False)


def test_formula():
    mixture, x = make(), torch.randn(5, 2, 3).double()
    prior = (x @ mixture.prior.weight.t()).softmax(-1)
    latent = (x @ mixture.latent.weight.t() + mixture.latent.bias).tanh()
    expected = sum(
        prior[..., k : k + 1] * mixture.output_projection(latent[..., 4 * k : 4 * k + 4]).softmax(-1)
        for k in range(2)
    )
    torch.testing.assert_close(mixture(x), expected.log().float())


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(5, 4).double(), r"input must have shape \(..., 3\), got \[5, 4\]"),
        (torch.zeros(5, 3), "input must be torch.float64 as the parameters are, got torch.float32"),
        (torch.zeros(5, 3).double().to("meta"), "input must be on cpu"),
    ],
)
def test_errors(x, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()(x)
