"""The best words of a softmax, without the others' probabilities."""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from ._library import loaded


def log_softmax_topk(scores: Tensor, k: int, exclude: Sequence[int] = ()) -> Tuple[Tensor, Tensor]:
    """Find the ``k`` greatest log-probabilities of each row: ``scores.log_softmax(1).topk(k)``.

    On the CPU each row of float32 scores is read once and nothing of its length is written. There is no
    gradient.

    Args:
        scores: (N, V), before the softmax, of any floating dtype; probabilities are computed in float32
        k: at most V less ``exclude``
        exclude: columns that have their share of the probability but are not picked

    Returns:
        log-probabilities (N, k), float32, in descending order, and their columns (N, k), int64; where scores
        are NaN or too few finite ones are left, the log-probability is minus infinity

    Raises:
        TypeError: ``scores`` are not floating
        ValueError: ``scores`` are not strided or have not two axes, or ``k`` or ``exclude`` does not fit them
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
    best, indices = scores.index_fill(1, columns, -torch.inf).topk(k)
    log_probs = best - scores.logsumexp(1, keepdim=True)
    return log_probs.masked_fill(log_probs.isnan(), -torch.inf), indices
