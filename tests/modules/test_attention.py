"""StepAttention beside its formula."""

import math

import pytest
import torch

from fairseq_lrn.modules import StepAttention


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "dot"])
@pytest.mark.parametrize("heads", [1, 2])
def test_formula(heads, additive):
    torch.manual_seed(1)
    attention = StepAttention(3, 4, heads, additive).double()
    query, memory = torch.randn(2, 3).double(), torch.randn(5, 2, 4).double()
    mask = torch.tensor([[False] * 5, [True, False, False, False, True]])
    attention.requires_grad_(False)
    context, weights = attention(query, *attention.project(memory, mask), mask)
    size = 4 // heads
    for b in range(2):
        real = [s for s in range(5) if not mask[b, s]]
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q = (attention.query.weight @ query[b] + attention.query.bias)[part]
            keys = [(attention.key.weight @ memory[s, b])[part] for s in real]
            if additive:
                scores = [float(attention.score[h] @ (q + key).tanh()) for key in keys]
            else:
                scores = [float(q @ key) / math.sqrt(size) for key in keys]
            total = sum(map(math.exp, scores))
            expected = [math.exp(score) / total for score in scores]
            assert weights[b, h, real].tolist() == pytest.approx(expected)
            assert float(weights[b, h].sum()) == pytest.approx(1)
            found = sum(w * memory[s, b, part] for w, s in zip(expected, real))
            torch.testing.assert_close(context[b, part], found)


def test_gradients():
    attention = StepAttention(3, 4, 2).double()
    query, memory = (
        torch.randn(2, 3).double().requires_grad_(),
        torch.randn(5, 2, 4).double().requires_grad_(),
    )
    mask = torch.tensor([[False] * 5, [True, False, False, False, True]])
    assert torch.autograd.gradcheck(lambda q, m: attention(q, *attention.project(m), mask), (query, memory))


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "dot"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_content_has_no_gradient(value, additive):
    attention = StepAttention(3, 4, 2, additive)
    mask = torch.tensor([[False] * 5, [True, False, False, False, True]])
    padding, results = mask.t().unsqueeze(2), []
    query, full = torch.randn(4, 3), torch.randn(5, 2, 4)
    for content in (0.0, value):
        memory = full.masked_fill(padding, content).requires_grad_()
        context, weights = attention(query, *attention.project(memory, mask), mask)
        (context.sum() + weights.square().sum()).backward()
        assert not memory.grad.masked_select(padding).any()
        results.append([context, weights, memory.grad, *(p.grad for p in attention.parameters())])
        attention.zero_grad()
    torch.testing.assert_close(*results)


def test_memories_that_do_not_fit():
    attention, memory = StepAttention(3, 4), torch.zeros(5, 2, 4)
    for bad in (memory[0], memory[..., 1:]):
        with pytest.raises(ValueError, match=r"memory must have shape \(T, B, 4\), got"):
            attention.project(bad)
    with pytest.raises(ValueError, match=r"padding_mask must have shape \[2, 5\]"):
        attention.project(memory, torch.zeros(5, 2, dtype=torch.bool))


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide memory_dim, 4, got 3"):
        StepAttention(3, 4, 3)
