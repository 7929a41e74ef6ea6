"""AttentivePooling beside its formula."""

import pytest
import torch

from fairseq_lrn.modules import AttentivePooling

MASK = torch.tensor([[False] * 5, [True, False, False, True, True]])


def test_formula():
    pooling, x = AttentivePooling(4).double().requires_grad_(False), torch.randn(5, 2, 4).double()
    for mask in (None, MASK):
        found = pooling(x, mask)
        for b in range(2):
            real = x[:, b] if mask is None else x[~mask[b], b]
            scores = (real @ pooling.projection.weight.t() + pooling.projection.bias).tanh()
            weights = (scores @ pooling.query.weight.t()).exp()
            torch.testing.assert_close(found[b], (weights / weights.sum() * real).sum(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_content_has_no_gradient(value):
    pooling, full, results = AttentivePooling(4), torch.randn(5, 2, 4), []
    for content in (0.0, value):
        x = full.masked_fill(MASK.t().unsqueeze(2), content).requires_grad_()
        pooled = pooling(x, MASK)
        pooled.square().sum().backward()
        assert not x.grad.masked_select(MASK.t().unsqueeze(2)).any()
        results.append([pooled, x.grad, *(p.grad for p in pooling.parameters())])
        pooling.zero_grad()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (torch.zeros(5, 4), None, r"x must have shape \(T, B, 4\), got \[5, 4\]"),
        (torch.zeros(5, 2, 3), None, r"x must have shape \(T, B, 4\), got \[5, 2, 3\]"),
        (torch.zeros(5, 2, 4), MASK[:1], r"padding_mask must have shape \[2, 5\]"),
        (torch.zeros(5, 2, 4), MASK.int(), "padding_mask must be torch.bool, but is torch.int32"),
    ],
)
def test_errors(x, mask, words):
    with pytest.raises((TypeError, ValueError), match=words):
        AttentivePooling(4)(x, mask)
