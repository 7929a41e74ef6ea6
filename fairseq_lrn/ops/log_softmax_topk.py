"""The best words of a softmax, without the others' probabilities."""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from ._library import loaded


def log_softmax_topk(scores: Tensor, k: int, exclude: Sequence[int] = ()) -> Tuple[Tensor, Tensor]:
    """Find the ``k`` greatest log-probabilities of each row: ``scores.log_softmax(1).topk(k)``.

    On the CPU the operator reads each row of float32 scores once and writes nothing of that length. There is
    no
    gradient.

    Args:
        scores: (N, V), before the softmax, of any floating dtype; probabilities are computed in float32
        k: at most V less ``exclude``
        exclude: columns that count in the softmax but are not returned

    Returns:
        log-probabilities (N, k), float32, in descending order, and their columns (N, k), int64. If scores are
        NaN, or too few are finite, the log-probability is minus infinity.

    Raises:
        TypeError: ``scores`` are not floating
        ValueError: ``scores`` are not strided, or not of two axes, or ``k`` or ``exclude`` does not fit
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores must be of a floating dtype, got {scores.dtype}")
    if scores.layout != torch.strided or scores.is_nested:
        raise ValueError(f"scores must be strided, got {'nested' if scores.is_nested else scores.layout}")
    if scores.dim() != 2:
        raise ValueError(f"scores must have 2 axes (N, V), got {scores.dim()}")
    if not 0 < k <= scores.size(1) - len(exclude):
        raise ValueError(
            f"k must be between 1 and {scores.size(1) - len(exclude)}, the columns of scores that are not "
            f"excluded, got {k}"
        )
    if any(not 0 <= column < scores.size(1) for column in exclude):
        raise ValueError(f"exclude must be columns from 0 to {scores.size(1) - 1}, got {list(exclude)}")
    scores = scores.detach().float()
    if loaded and scores.device.type == "cpu":
        return torch.ops.fairseq_lrn.log_softmax_topk(scores, k, exclude)
    # the greatest scores, and not the greatest of probabilities that rounding may have made equal
    columns = torch.tensor(exclude, dtype=torch.int64, device=scores.device)
    best, indices = topk(scores.index_fill(1, columns, -torch.inf), k)
    log_probs = best - scores.logsumexp(1, keepdim=True)
    return log_probs.masked_fill(log_probs.isnan(), -torch.inf), indices


def topk(scores: Tensor, k: int, block: int = 128) -> Tuple[Tensor, Tensor]:
    """``scores.topk(k)``, in descending order, for rows that are much longer than ``k``.

    PyTorch's topk reads a row many times on a GPU. Here the maxima of blocks show which blocks have the best.

    Args:
        scores: (N, V)
        k: at most V
        block: columns of a block

    Returns:
        the best scores (N, k) and their columns (N, k), int64
    """
    if k == 1:
        best, columns = scores.max(1, keepdim=True)
        return best, columns
    blocks, rest = scores.size(1) // block, scores.size(1) % block
    if blocks < 4 * k:
        return scores.topk(k)
    whole = scores[:, : blocks * block].unflatten(1, (blocks, block))
    places = whole.amax(2).topk(k)[1].unsqueeze(2)
    best = whole.gather(1, places.expand(-1, -1, block)).flatten(1)
    columns = (places * block + torch.arange(block, device=scores.device)).flatten(1)
    if rest > 0:
        last = torch.arange(blocks * block, scores.size(1), device=scores.device)
        best = torch.cat([best, scores[:, blocks * block :]], 1)
        columns = torch.cat([columns, last.expand(len(scores), -1)], 1)
    best, chosen = best.topk(k)
    return best, columns.gather(1, chosen)
