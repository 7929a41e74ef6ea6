"""The linear layer against its definition, whichever code the row count and the machine choose."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_lrn.ops import linear


def strided(x, kind):
    """``x`` with other strides in memory."""
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.size(-1)]
    if kind == "stepped":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if kind == "one number" and x.numel() > 0:
        return x.flatten()[0].expand(x.shape)
    if kind == "one row" and x.dim() > 1 and x.size(0) > 0:
        return x[:1].expand(x.shape)
    if kind == "overlapping" and x.dim() == 2 and x.numel() > 0:
        return x.new_tensor(range(x.size(0) + x.size(1))).sin().as_strided(x.shape, (1, 1))
    return x


STRIDES = ["same", "transposed", "sliced", "stepped", "one number", "one row", "overlapping"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_definition(instruction_set, data):
    """Values and gradients; the operator takes 8 rows at most one way, and more another."""
    rows, columns, outputs = (data.draw(st.integers(low, high)) for low, high in ((0, 50), (1, 70), (1, 50)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    x, weight, bias, grad = (
        torch.randn(*size, generator=generator, dtype=dtype)
        for size in ((rows, columns), (outputs, columns), (outputs,), (rows, outputs))
    )
    x, weight, bias, grad = (
        strided(tensor, data.draw(st.sampled_from(STRIDES))) for tensor in (x, weight, bias, grad)
    )
    shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])) if rows > 0 else (0,)
    tensors = [x.unflatten(0, shape), weight, *([bias] if data.draw(st.booleans()) else [])]
    grad = grad.unflatten(0, shape)
    needed = data.draw(st.sets(st.integers(0, len(tensors) - 1), min_size=1))

    def run(function, tensors, grad):
        tensors = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(tensors)]
        result = function(*tensors)
        return [result, *torch.autograd.grad(result, [tensors[i] for i in needed], grad)]

    expected = run(torch.nn.functional.linear, [tensor.double() for tensor in tensors], grad.double())
    for found, wanted in zip(run(torch.ops.fairseq_lrn.linear, tensors, grad), expected):
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_large_products(instruction_set, data):
    """More than one block of 512 by 256, in whole vectors and not, on one thread and two."""
    rows, columns, outputs = (data.draw(st.sampled_from([5, 40, 256, 600, 1027])) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((rows, columns), (outputs, columns), (outputs,))
    )
    x, weight = (strided(tensor, data.draw(st.sampled_from(STRIDES[:4]))) for tensor in (x, weight))
    bias = bias if data.draw(st.booleans()) else None
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    found = linear(x, weight, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * columns)


@pytest.mark.parametrize("rows", [1, 8, 9, 32])
def test_a_bias_may_lie_anywhere(rows, instruction_set):
    x, weight = torch.zeros(rows, 16), torch.zeros(48, 16)
    for bias in (torch.arange(96.0)[::2], torch.tensor(3.0).expand(48), torch.randn(48, 2).t()[1]):
        for function in (linear, torch.ops.fairseq_lrn.linear):
            assert torch.equal(function(x, weight, bias), bias.expand(rows, 48))


@pytest.mark.parametrize("shape", [(1,), (1, 48), (48, 1), (6, 8), (96,), ()])
def test_a_bias_of_another_shape_is_an_error(shape):
    x, weight, bias = torch.zeros(40, 16), torch.zeros(48, 16), torch.zeros(shape)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        torch.ops.fairseq_lrn.linear(x, weight, bias)
    for function in (linear, torch.jit.script(linear)):
        with pytest.raises(Exception, match=r"bias must have shape \[48\]"):
            function(x, weight, bias)
    with pytest.raises(Exception, match="bias must have shape"):
        torch.compile(linear, fullgraph=True, backend="eager")(x, weight, bias)


def test_windows_that_overlap():
    x = torch.randn(5000).unfold(0, 8, 4)[:1200].view(30, 40, 8).requires_grad_()
    weight = torch.randn(12, 8, requires_grad=True)
    linear(x, weight).square().sum().backward()
    expected = 2 * torch.nn.functional.linear(x, weight).detach().flatten(0, 1)
    torch.testing.assert_close(weight.grad, expected.t() @ x.detach().flatten(0, 1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad.flatten(0, 1), expected @ weight.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [3, 40])
def test_batches_of_gradients(rows):
    x, weight, bias = torch.randn(2, rows, 3), torch.randn(2, 3), torch.randn(2)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(linear, (x, weight, bias), vectorize=vectorize)
        expected = torch.autograd.functional.jacobian(torch.nn.functional.linear, (x, weight, bias))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", [linear, torch.ops.fairseq_lrn.linear], ids=["public", "operator"])
def test_transforms(function):
    """torch.func and forward-mode AD, of the public function and of the operator."""
    definition = torch.nn.functional.linear
    x, weight, bias = torch.randn(3, 40, 5), torch.randn(3, 4, 5), torch.randn(4)
    tangents = tuple(torch.randn_like(tensor) for tensor in (x[0], weight[0], bias))
    results = []
    for f in (function, definition):

        def loss(x, weight, bias, f=f):
            return f(x, weight, bias).square().sum()

        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x[0], tangents[0])
            dual = torch.autograd.forward_ad.unpack_dual(f(dual, weight[0], bias)).tangent
        results.append(
            [
                torch.func.grad(loss, (0, 1, 2))(x[0], weight[0], bias),
                torch.func.jvp(f, (x[0], weight[0], bias), tangents),
                torch.func.vmap(f, (0, 0, None))(x, weight, bias),
                torch.func.vmap(torch.func.grad(loss, 1), (0, None, None))(x, weight[0], bias),
                torch.func.hessian(loss, 2)(x[0], weight[0], bias),
                dual,
            ]
        )
    torch.testing.assert_close(*results)


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
    torch.testing.assert_close(linear(x.to_sparse(), weight, bias), expected)
    torch.testing.assert_close(linear(torch.nested.nested_tensor([x, x]), weight, bias).unbind()[1], expected)
    assert linear(x.half(), weight.half()).dtype == torch.float16
