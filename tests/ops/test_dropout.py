"""dropout beside its definition."""

import pytest
import torch
from batches import DEVICES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fairseq_lrn.ops import dropout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_zeroes_with_probability_p_and_keeps_the_mean(p, device):
    torch.manual_seed(1)
    number = 400_000
    y = dropout(torch.ones(number, device=device), p).cpu()
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-4)
    # within five standard deviations: all, both halves of a random number, and pairs: of halves, of
    # counters, of the four numbers of a counter, and of blocks
    deviation = (p * (1 - p)) ** 0.5
    for part in (kept, *kept.view(-1, 2).unbind(1)):
        assert abs(part.double().mean() - (1 - p)) < 5 * deviation / len(part) ** 0.5
    for distance in (1, 2, 3, 4, 8, 128, 256, 512, 1024):
        both = (kept[distance:] & kept[:-distance]).double().mean()
        assert abs(both - (1 - p) ** 2) < 5 / number**0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_scaled_where_the_output_is_kept(dtype, device):
    x = torch.rand(3, 5, 7, dtype=dtype, device=device).add(1).transpose(0, 1).requires_grad_()
    y = dropout(x, 0.3)
    gradient = torch.rand_like(y)
    y.backward(gradient)
    assert y.shape == x.shape and y.dtype == dtype
    scale = torch.where(y == 0, 0.0, 1 / 0.7).double()
    rtol = 2e-2 if dtype.itemsize == 2 else 1e-4
    assert torch.allclose(y.double(), x.double() * scale, rtol=rtol)
    assert torch.allclose(x.grad.double(), gradient.double() * scale, rtol=rtol)


def test_ends_of_the_range():
    x = torch.randn(1000)
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()
    for p in (1.5, -0.5):
        with pytest.raises(ValueError, match="dropout probability"):
            dropout(x, p)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,)])
def test_any_size(shape):
    assert dropout(torch.ones(shape), 0.5).shape == shape


def test_bits_are_philox():
    """The published test vector of Philox4x32-10 for counter 0 and key 0 (Salmon et al. 2011)."""
    for number, bits in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for element, half in ((128 * number, bits & 0xFFFF), (128 * number + 1, bits >> 16)):
            kept = [
                bool(torch.ops.fairseq_lrn.dropout(torch.ones(1000), drop / 2**16, 0)[element])
                for drop in (half, half + 1)
            ]
            assert kept == [True, False]


def test_is_the_same_everywhere(instruction_set):
    x = torch.randn(300_001)
    expected = torch.ops.fairseq_lrn.dropout(x[:1000], 0.4, 7)
    for number in (1, 2):
        torch.set_num_threads(number)
        assert torch.equal(torch.ops.fairseq_lrn.dropout(x, 0.4, 7)[:1000], expected)
        found = torch.ops.fairseq_lrn.dropout(x.bfloat16(), 0.4, 7)
        assert torch.equal(found == 0, torch.ops.fairseq_lrn.dropout(x, 0.4, 7) == 0)


def test_what_is_not_a_number_stays(instruction_set):
    y = torch.ops.fairseq_lrn.dropout(torch.full((1000,), torch.nan), 0.5, 7)
    assert y.isnan().all()


def test_strides_are_kept():
    x = torch.randn(6, 4).t().requires_grad_()
    y = dropout(x, 0.5)
    assert y.stride() == x.stride() == torch.nn.functional.dropout(x, 0.5).stride()
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)


def test_nested_tensors():
    x = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(5, 2)], layout=torch.jagged)
    assert dropout(x, 0.5).values().unique().tolist() == [0.0, 2.0]


def test_forward_derivatives_of_a_gradient():
    x, ones = torch.randn(50, requires_grad=True), torch.ones(50)
    y = dropout(x, 0.5)
    with torch.autograd.forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, torch.autograd.forward_ad.make_dual(ones, ones))
        parts = torch.autograd.forward_ad.unpack_dual(grad)
    assert torch.equal(parts.primal, (y != 0) * 2.0) and torch.equal(parts.tangent, parts.primal)


def test_second_derivatives():
    x = torch.randn(5, requires_grad=True)
    y = dropout(x, 0.5)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    scale = (y != 0) * 2
    torch.testing.assert_close(second, 6 * x * scale**3)


def test_seed_decides():
    x = torch.ones(100)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    assert not torch.equal(dropout(x, 0.5), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)


class Half(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scripts_traces_compiles_and_transforms(dtype):
    x, half = torch.ones(1000, dtype=dtype), Half()
    functions = (
        torch.jit.script(half),
        torch.jit.trace(half, x, check_trace=False),
        torch.compile(half, fullgraph=True, backend="aot_eager"),
        torch.export.export(half, (x,)).module(),
        make_fx(half)(x),
        torch.func.vmap(half, randomness="different"),
        lambda x: torch.func.jvp(half, (x,), (x,))[1],
    )
    for f in functions:
        y = f(x)
        assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < y.mean() / 2 < 0.6
        assert not torch.equal(y, f(x))


def test_fake_tensors():
    with FakeTensorMode():
        y = dropout(torch.ones(3, 5), 0.5)
    assert y.shape == (3, 5)
