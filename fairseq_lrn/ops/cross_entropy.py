"""Label-smoothed cross entropy whose scores become its gradient."""

from typing import Tuple

import torch
from torch import Tensor

from ._library import loaded


def cross_entropy_(scores: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tuple[Tensor, Tensor]:
    """Return the loss of ``scores``, with and without smoothing, and write its gradient in their place.

    It is fairseq's ``label_smoothed_nll_loss``: each wrong word gets label_smoothing / (V - 1). On the CPU
    one operator reads each row once from memory.

    Args:
        scores: (N, V), before the softmax, float32, each row contiguous. They become the gradient.
        target: (N,), int64
        label_smoothing: from 0 to 1

    Returns:
        two sums over N, float32: the loss, and the negative log-likelihood. A NaN, or plus infinity, among
        the scores makes both NaN.

    Raises:
        TypeError: scores are not float32, or target is not int64
        ValueError: a shape, layout or device is wrong
        IndexError: target is no column of scores, on the CPU
    """
    if scores.dtype != torch.float32 or target.dtype != torch.int64:
        raise TypeError(f"scores must be float32 and target int64, got {scores.dtype} and {target.dtype}")
    matrix = scores.dim() == 2 and scores.size(1) >= 2 and scores.stride(1) == 1
    if not matrix or (len(scores) > 1 and scores.stride(0) < scores.size(1)):
        raise ValueError(
            "scores must be (N, V), V at least 2, with contiguous rows apart, got shape "
            f"{list(scores.shape)} and strides {list(scores.stride())}"
        )
    if target.shape != scores.shape[:1]:
        raise ValueError(f"target must have shape {[len(scores)]}, got {list(target.shape)}")
    if target.device != scores.device:
        raise ValueError(f"target must be on scores' device {scores.device}, got {target.device}")
    if loaded and scores.device.type == "cpu":
        return torch.ops.fairseq_lrn.cross_entropy_(scores, target, label_smoothing)
    each = label_smoothing / (scores.size(1) - 1)
    words = target[:, None]
    log_probs = scores.log_softmax(1)
    nll, smooth = -log_probs.gather(1, words).sum(), -log_probs.sum()
    # softmax - each, of the right word softmax - (1 - smoothing)
    torch.exp(log_probs, out=scores).sub_(each)
    scores.scatter_add_(1, words, scores.new_full(words.shape, label_smoothing + each - 1))
    return (1 - label_smoothing - each) * nll + each * smooth, nll
