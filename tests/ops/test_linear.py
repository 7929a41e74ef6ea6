"""The linear layer against its definition, whichever code the row count and the machine choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lrn.ops import linear


@settings(deadline=None)
@given(st.data())
def test_equals_the_definition(data):
    """Values and gradients; the operator takes 8 rows at most one way, and 32 and more another."""
    rows, columns, outputs = (data.draw(st.integers(low, high)) for low, high in ((0, 50), (1, 70), (1, 50)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    x, weight, bias, grad = (
        torch.randn(*size, generator=generator, dtype=dtype)
        for size in ((rows, columns), (outputs, columns), (outputs,), (rows, outputs))
    )
    if data.draw(st.booleans()):
        x, weight, grad = (matrix.t().contiguous().t() for matrix in (x, weight, grad))
    shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])) if rows > 0 else (0,)
    tensors = [x.unflatten(0, shape), weight, *([bias] if data.draw(st.booleans()) else [])]
    grad = grad.unflatten(0, shape)

    def run(function, tensors, grad):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        result = function(*tensors)
        return [result, *torch.autograd.grad(result, tensors, grad)]

    expected = run(torch.nn.functional.linear, [tensor.double() for tensor in tensors], grad.double())
    for found, wanted in zip(run(torch.ops.fairseq_lrn.linear, tensors, grad), expected):
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_second_derivatives():
    x, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((40, 3), (2, 3), (2,)))
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradgradcheck(torch.ops.fairseq_lrn.linear, tensors)


def test_only_the_gradients_that_are_asked_for():
    x, weight = torch.randn(40, 3), torch.randn(2, 3, requires_grad=True)
    linear(x, weight, torch.zeros(2)).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(2, 3))


def test_refuses_what_does_not_fit():
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    for bad in (
        (x[0], weight),
        (x[:, 1:], weight),
        (x, weight[0]),
        (x, weight, bias[1:]),
        (x, weight.double()),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.fairseq_lrn.linear(*bad)


def test_autocast_compilers_and_other_types_get_pytorchs():
    x, weight, bias = torch.randn(40, 3), torch.randn(2, 3), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    expected = torch.nn.functional.linear(x, weight, bias)
    for function in (torch.jit.script(linear), torch.compile(linear, fullgraph=True, backend="eager")):
        torch.testing.assert_close(function(x, weight, bias), expected)
    torch.testing.assert_close(linear(x[0], weight, bias), expected[0])
    assert linear(x.half(), weight.half()).dtype == torch.float16
