"""What MixtureOfSoftmaxes refuses; tests/models/test_lrn_lm.py has its formula."""

import pytest
import torch
from torch import nn

from fairseq_lrn.modules import MixtureOfSoftmaxes


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
        MixtureOfSoftmaxes(3, 2, nn.Linear(4, 7)).double()(x)
