"""cross_entropy_ against its definition, in float64."""

import pytest
import torch
from batches import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lrn.ops import cross_entropy_


def definition(scores, target, smoothing):
    """The loss, as fairseq writes it, the negative log-likelihood, and the gradient, in float64."""
    scores = scores.double().requires_grad_()
    log_probs = scores.log_softmax(1)
    each = smoothing / (scores.size(1) - 1)
    nll = -log_probs.gather(1, target[:, None]).sum()
    loss = (1 - smoothing - each) * nll - each * log_probs.sum()
    (grad,) = torch.autograd.grad(loss, scores)
    return loss.detach(), nll.detach(), grad


def assert_definition(scores, target, smoothing):
    expected = definition(scores, target, smoothing)
    found = cross_entropy_(scores, target, smoothing)
    assert [x.dtype for x in found] == [torch.float32] * 2
    scale = 1 + expected[0].abs().item()
    for ours, wanted in zip(found, expected):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(scores.double(), expected[2], rtol=1e-4, atol=1e-6)


# around the 64 lanes, where the kernel's loops begin and end
@pytest.mark.parametrize("size", [2, 3, 63, 64, 65, 130, 7792])
@pytest.mark.parametrize("device", DEVICES)
def test_definition(device, size, instruction_set):
    generator = torch.Generator().manual_seed(size)
    for scale in (0.1, 3, 50):
        for smoothing in (0.0, 0.1, 1.0):
            scores = (scale * torch.randn(7, size, generator=generator)).to(device)
            target = torch.randint(size, (7,), generator=generator).to(device)
            assert_definition(scores, target, smoothing)


@settings(deadline=None)
@given(st.data())
def test_any_scores(data):
    size, rows = data.draw(st.integers(2, 100)), data.draw(st.integers(0, 4))
    numbers = st.floats(-1e4, 1e4, width=32)
    values = data.draw(st.lists(numbers, min_size=rows * size, max_size=rows * size))
    words = data.draw(st.lists(st.integers(0, size - 1), min_size=rows, max_size=rows))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, size)
    target = torch.tensor(words, dtype=torch.int64)
    assert_definition(scores, target, data.draw(st.sampled_from([0.0, 0.1])))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 70, 129])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_a_number_stays(device, value, column, instruction_set):
    """Training must see it."""
    scores = torch.zeros(2, 130, device=device)
    scores[1, column] = value
    loss, nll = cross_entropy_(scores, torch.tensor([3, 4], device=device), 0.1)
    assert loss.isnan() and nll.isnan()
    assert scores[0].isfinite().all() and scores[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_larger_matrix(device):
    whole = torch.randn(6, 90, generator=torch.Generator().manual_seed(0)).to(device)
    before = whole.clone()
    assert_definition(whole[::2, 5:80], torch.tensor([0, 70, 9], device=device), 0.1)
    whole[::2, 5:80] = before[::2, 5:80]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("offset", [1e5, -1e7])
@pytest.mark.parametrize("device", DEVICES)
def test_what_all_scores_share_does_not_matter(device, offset, instruction_set):
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) + offset
    assert_definition(scores.to(device), torch.tensor([0, 999, 5, 7], device=device), 0.1)


def test_huge_scores():
    scores = torch.zeros(1, 200)
    scores[0, [3, 67]], scores[0, [4, 68]] = -3e38, 3e38
    loss, nll = cross_entropy_(scores, torch.tensor([4]))
    assert loss == nll == torch.tensor(2.0).log() and scores.isfinite().all()


def test_autograd_sees_that_scores_change():
    scores, weight = torch.randn(3, 5), torch.ones(3, 5, requires_grad=True)
    result = (weight * scores).sum()
    cross_entropy_(scores, torch.arange(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()
    with pytest.raises(RuntimeError, match=r"must not require a gradient|leaf Variable that requires grad"):
        cross_entropy_(torch.zeros(1, 5, requires_grad=True), torch.zeros(1).long())


def test_a_word_that_is_impossible():
    scores = torch.zeros(1, 100)
    scores[0, 7] = -torch.inf
    assert torch.isclose(cross_entropy_(scores, torch.tensor([3]))[1], torch.tensor(99.0).log())
    assert 0 <= scores[0, 7] < 1e-37


@pytest.mark.parametrize(
    "scores, target, error, words",
    [
        (torch.zeros(2, 5).bfloat16(), torch.zeros(2).long(), TypeError, "scores must be float32"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, "target int64, got"),
        (torch.zeros(5, 2).t(), torch.zeros(2).long(), ValueError, "with contiguous rows"),
        (torch.zeros(1, 5).expand(2, 5), torch.zeros(2).long(), ValueError, "contiguous rows apart"),
        (torch.zeros(9).as_strided((2, 5), (3, 1)), torch.zeros(2).long(), ValueError, "rows apart"),
        (torch.zeros(2, 1), torch.zeros(2).long(), ValueError, "V at least 2"),
        (torch.zeros(5), torch.zeros(2).long(), ValueError, "with contiguous rows"),
        (torch.zeros(2, 5), torch.zeros(3).long(), ValueError, r"target must have shape \[2\]"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), IndexError, "target must be from 0 to 4, got 5"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), IndexError, "target must be from 0 to 4, got -1"),
    ],
)
def test_refuses(scores, target, error, words):
    before = scores.clone()
    with pytest.raises(error, match=words):
        cross_entropy_(scores, target)
    assert torch.equal(scores, before)
