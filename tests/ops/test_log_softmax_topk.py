"""log_softmax_topk against what it is short for, in float64."""

import pytest
import torch
from batches import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lrn.ops import log_softmax_topk
from fairseq_lrn.ops.log_softmax_topk import topk


def expected(scores, k, exclude):
    log_probs = scores.double().log_softmax(1)
    log_probs[:, list(exclude)] = -torch.inf
    return log_probs.topk(k)


def assert_definition(scores, k, exclude):
    values, indices = log_softmax_topk(scores, k, exclude)
    wanted, _ = expected(scores, k, exclude)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    scale = scores.double().abs().max().item()
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-6 * (1 + scale))
    # equal scores may come in any order, but each column once
    found = scores.double().log_softmax(1).gather(1, indices)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(len(set(row)) == k and not set(row) & set(exclude) for row in indices.tolist())


# around a class's 64 lanes and a block's 4,096 elements, where the kernel's loops begin and end
SIZES = [1, 2, 63, 64, 65, 130, 4095, 4096, 4097, 7792]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_definition(device, size, instruction_set):
    generator = torch.Generator().manual_seed(size)
    for scale in (0.1, 3, 50):
        scores = (scale * torch.randn(7, size, generator=generator)).to(device)
        for k, exclude in ((1, ()), (10, (1,)), (40, (2, 1, 60)), (size, ())):
            if k + len(exclude) <= size:
                assert_definition(scores, k, exclude)


@settings(deadline=None)
@given(st.data())
def test_few_different_scores(data):
    """Ties everywhere, and an excluded column is often among the greatest."""
    size = data.draw(st.integers(1, 300))
    rows = data.draw(st.integers(0, 3))
    exclude = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    k = data.draw(st.integers(1, size - len(exclude)))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=rows * size, max_size=rows * size))
    if rows:
        assert_definition(torch.tensor(values, dtype=torch.float32).view(rows, size), k, sorted(exclude))
    else:
        assert [x.shape for x in log_softmax_topk(torch.empty(0, size), k, sorted(exclude))] == [(0, k)] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_are_not_finite(device, instruction_set):
    scores = torch.full((3, 200), -torch.inf, device=device)
    scores[0, 7] = 1
    scores[1] = 0
    scores[1, 100] = torch.nan
    scores[2, [3, 150]] = torch.tensor([2.0, 1.0], device=device)
    values, indices = log_softmax_topk(scores, 3, [150])
    assert values[0].tolist() == [0, -torch.inf, -torch.inf] and indices[0, 0] == 7
    assert values[1].tolist() == [-torch.inf] * 3  # as a NaN is in every probability
    torch.testing.assert_close(values[2, 0].cpu(), torch.tensor([2.0, 1.0]).log_softmax(0)[0])
    assert indices[2, 0] == 3 and values[2, 1:].tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_strides(dtype):
    scores = torch.randn(130, 6, generator=torch.Generator().manual_seed(1)).to(dtype).t()
    for view in (scores, scores[::2], scores[:, ::2], scores.float()[1:, 3:]):
        values, _ = log_softmax_topk(view, 5, [0])
        torch.testing.assert_close(values.double(), expected(view, 5, [0])[0], rtol=1e-5, atol=1e-6)


def test_there_is_no_gradient():
    values, _ = log_softmax_topk(torch.randn(2, 9, requires_grad=True), 3)
    assert not values.requires_grad


def test_threads_give_the_same():
    scores = torch.randn(100, 5000)
    alone = log_softmax_topk(scores, 10)
    torch.set_num_threads(3)
    together = log_softmax_topk(scores, 10)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize(
    "scores, k, exclude, words",
    [
        (torch.zeros(2, 5).long(), 1, (), "scores must be of a floating dtype, got torch.int64"),
        (torch.zeros(2, 5).to_sparse(), 1, (), "scores must be strided, got torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.zeros(5)]), 1, (), "scores must be strided, got nested"),
        (torch.zeros(3), 1, (), "scores must have 2 axes (N, V), got 1"),
        (torch.zeros(2, 5), 0, (), "k must be between 1 and 5"),
        (
            torch.zeros(2, 5),
            5,
            (1,),
            "k must be between 1 and 4, the columns of scores that are not excluded",
        ),
        (torch.zeros(2, 5), 1, (-1,), "exclude must be columns from 0 to 4, got [-1]"),
        (torch.zeros(2, 5), 1, (0, 5), "exclude must be columns from 0 to 4, got [0, 5]"),
    ],
)
def test_errors(scores, k, exclude, words):
    with pytest.raises((TypeError, ValueError)) as error:
        log_softmax_topk(scores, k, exclude)
    assert words in str(error.value)


@given(st.integers(1, 5), st.integers(1, 700), st.data())
@settings(deadline=None, max_examples=60)
def test_topk_by_blocks(rows, columns, data):
    k, block = data.draw(st.integers(1, columns)), data.draw(st.integers(1, 40))
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    best, chosen = topk(scores, k, block)
    assert torch.equal(best, scores.topk(k)[0])
    assert torch.equal(scores.gather(1, chosen), best)
