"""Attention against its definition."""

import pytest
import torch
from batches import DEVICES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_lrn.ops import attention


def definition(query, keys_values, padding_mask=None):
    """In float64, a sentence after the other."""
    keys, values = keys_values.double()
    results = []
    for n, row in enumerate(query.double().unbind(1)):  # (T, C)
        sentence = n * len(keys) // query.size(1)
        heads = []
        for x, k, v in zip(row.chunk(len(keys[sentence]), 1), keys[sentence], values[sentence]):
            scores = x @ k.t() / k.size(1) ** 0.5
            if padding_mask is not None:
                scores = scores.masked_fill(padding_mask[sentence], -torch.inf)
            heads.append(scores.softmax(1).nan_to_num(0) @ v)
        results.append(torch.cat(heads, 1))
    return torch.stack(results, 1)


def with_gradients(function, query, keys_values, *others, grad):
    tensors = [x.detach().requires_grad_() for x in (query, keys_values)]
    result = function(*tensors, *others)
    return [result, *torch.autograd.grad(result, tensors, grad.to(result.dtype))]


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_definition(instruction_set, data):
    """Values and gradients of any sizes: the operator takes 48 queries at a time, and whole vectors."""
    steps, each, sentences, heads, positions, dim = (
        data.draw(st.integers(1, most)) for most in (60, 3, 3, 3, 40, 40)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    query, grad, keys_values = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in (
            (sentences * each, steps, heads * dim),
            (steps, sentences * each, heads * dim),
            (2, sentences, heads, dim, positions),
        )
    )
    query, keys_values = query.transpose(0, 1), keys_values.transpose(3, 4)
    mask = []
    if data.draw(st.booleans()):
        mask = [torch.rand(sentences, positions, generator=generator) < 0.5]
        mask[0][:, data.draw(st.integers(0, positions - 1))] = False
    expected = with_gradients(definition, query, keys_values, *mask, grad=grad)
    found = with_gradients(torch.ops.fairseq_lrn.attention, query, keys_values, *mask, grad=grad)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for x, wanted in zip(found, expected):
        assert x.dtype == dtype and x.shape == wanted.shape
        assert (x.double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_type_and_device(dtype, device):
    query, keys_values = torch.randn(5, 6, 8), torch.randn(2, 3, 2, 7, 4)
    mask = torch.rand(3, 7) < 0.4
    mask[:, 0] = False
    arguments = [x.to(device, dtype) for x in (query, keys_values)]
    grad = torch.randn(5, 6, 8).to(device, dtype)
    expected = with_gradients(definition, *arguments, mask.to(device), grad=grad)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for x, wanted in zip(with_gradients(attention, *arguments, mask.to(device), grad=grad), expected):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_padding_gives_zeros(dtype, instruction_set):
    query, keys_values = torch.randn(5, 2, 8).to(dtype), torch.randn(2, 2, 2, 7, 4).to(dtype)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1] = True
    found = with_gradients(attention, query, keys_values, mask, grad=torch.ones_like(query))
    assert not found[0][:, 1].any() and not found[1][:, 1].any() and not found[2][:, 1].any()
    assert found[0][:, 0].all()


def test_a_mask_may_lie_anywhere(instruction_set):
    """And any byte that is not 0 is True; one row is of all sentences."""
    query, keys_values = torch.randn(5, 2, 8), torch.randn(2, 2, 2, 7, 4)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 4:] = True
    expected = definition(query, keys_values, mask)
    integers = torch.where(mask, 2, 0).to(torch.uint8)
    columns = mask.t().contiguous().t()
    for other in (mask, columns, mask[:1], mask[:1].expand(2, 7), integers, integers.view(torch.bool)):
        torch.testing.assert_close(
            attention(query, keys_values, other).double(), expected, rtol=1e-4, atol=1e-4
        )


def test_scores_that_are_all_infinite(instruction_set):
    query, keys_values = torch.full((4, 1, 4), -1e38), torch.full((2, 1, 1, 2, 4), 4.0)
    assert not attention(query, keys_values).any()


def test_what_is_not_a_number_stays(instruction_set):
    """A NaN or an infinite score reaches the queries that read it, and no others; masked scores nobody."""
    keys_values, mask = torch.randn(2, 2, 1, 7, 4), torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3] = True
    for value in (torch.nan, torch.inf):
        for position, spoilt in ((3, False), (4, True)):
            changed = keys_values.clone()
            changed[0, 0, 0, position] = value
            found = attention(torch.ones(5, 2, 4), changed, mask)
            assert bool(found[:, 0].isnan().all()) is spoilt and not found[:, 1].isnan().any()


def test_large_scores(instruction_set):
    query, keys_values = torch.full((4, 1, 4), 1e4), torch.randn(2, 1, 1, 9, 4)
    keys_values[0, 0, 0] = torch.arange(9.0)[:, None] * 1e3
    torch.testing.assert_close(attention(query, keys_values)[0, 0], keys_values[1, 0, 0, -1])
    torch.testing.assert_close(attention(-query, keys_values)[0, 0], keys_values[1, 0, 0, 0])


def test_threads_give_the_same():
    query, keys_values = torch.randn(30, 64, 64), torch.randn(2, 64, 4, 20, 16)
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(with_gradients(attention, query, keys_values, grad=torch.ones_like(query)))
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_autocast_decides_the_type():
    query, keys_values = torch.randn(5, 6, 8), torch.randn(2, 3, 2, 7, 4)
    expected = attention(query, keys_values)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query.bfloat16(), keys_values)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


class Attention(torch.nn.Module):
    def forward(self, query: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention(query, keys_values, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scripts_traces_compiles_and_transforms(dtype):
    arguments = torch.randn(5, 6, 8).to(dtype), torch.randn(2, 3, 2, 7, 4).to(dtype), torch.rand(3, 7) < 0.3
    module = Attention()
    expected = attention(*arguments)
    for function in (
        torch.jit.script(module),
        torch.jit.trace(module, arguments),
        torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, arguments).module(),
        torch.func.functionalize(module),
    ):
        torch.testing.assert_close(function(*arguments), expected, rtol=2e-2, atol=2e-2)


def test_is_differentiable_once():
    query, keys_values = torch.randn(5, 2, 8, requires_grad=True), torch.randn(2, 2, 2, 7, 4)
    (grad,) = torch.autograd.grad(attention(query, keys_values).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("positions", [0, 3])
@pytest.mark.parametrize("steps", [0, 5])
def test_nothing_to_read_or_ask(steps, positions):
    query, keys_values = torch.randn(steps, 2, 8), torch.randn(2, 2, 2, positions, 4)
    found = with_gradients(attention, query, keys_values, grad=torch.ones(steps, 2, 8))
    assert [x.shape for x in found] == [query.shape, query.shape, keys_values.shape]
    assert positions > 0 or not any(x.any() for x in found)


@pytest.mark.parametrize(
    ("query", "keys_values", "mask", "words"),
    [
        ((5, 8), (2, 3, 2, 7, 4), None, "query must have 3 axes"),
        ((5, 3, 8), (3, 2, 7, 4), None, "keys_values must have 5 axes"),
        ((5, 3, 8), (3, 3, 2, 7, 4), None, "keys_values must be"),
        ((5, 3, 9), (2, 3, 2, 7, 4), None, "heads x d = 9"),
        ((5, 4, 8), (2, 3, 2, 7, 4), None, "for each of 3 sentences, but has 4"),
        ((5, 0, 8), (2, 0, 2, 7, 4), None, "one sentence at least"),
        ((5, 3, 8), (2, 3, 2, 7, 4), (3, 6), "padding_mask must have shape"),
    ],
)
def test_refuses(query, keys_values, mask, words):
    mask = None if mask is None else torch.zeros(mask, dtype=torch.bool)
    arguments = torch.randn(query), torch.randn(keys_values), mask
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fairseq_lrn.attention(*arguments)
    with pytest.raises((RuntimeError, ValueError)):
        attention(*arguments)
