"""The loss of a linear layer a few rows at a time, beside fairseq's of all of them."""

import pytest
import torch
from batches import DEVICES
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_lrn.modules import loss
from fairseq_lrn.modules.loss import linear_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 1, 40, 100])
@pytest.mark.parametrize("device", DEVICES)
def test_is_fairseqs(device, rows, smoothing, monkeypatch):
    monkeypatch.setattr(loss, "_ELEMENTS", 50 * 40)  # 40 rows at a time, and less than another
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 8, device=device), torch.randn(50, 8, device=device)
    target = torch.randint(50, (rows,), device=device)
    results = []
    for function in (
        linear_cross_entropy,
        lambda x, weight, target, smoothing: label_smoothed_nll_loss(
            (x @ weight.t()).log_softmax(1), target, smoothing
        ),
    ):
        tensors = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        found, nll = function(*tensors, target, smoothing)
        (3 * found).backward()
        results.append([found, nll, *(tensor.grad for tensor in tensors)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, target, smoothing)[0], results[1][0])


def test_bfloat16_is_as_exact_as_its_scores():
    torch.manual_seed(0)
    x, weight = torch.randn(60, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    target = torch.randint(50, (60,))
    tensors = [
        [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    found, expected = (linear_cross_entropy(*pair, target, 0.1) for pair in tensors)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    found[0].backward()
    expected[0].backward()
    for narrow, wide in zip(*tensors):
        assert narrow.grad.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.grad.float(), wide.grad, rtol=2e-2, atol=2e-2)


def test_is_differentiable_once():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = linear_cross_entropy(x, weight, torch.arange(4))[0] ** 2
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "dtypes", [(torch.float16,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2]
)
def test_refuses_other_types(dtypes):
    x, weight = (torch.randn(4, 3, dtype=dtype) for dtype in dtypes)
    with pytest.raises(TypeError, match="x and weight must both be float32 or bfloat16"):
        linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64))
