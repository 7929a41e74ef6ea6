"""Label-smoothed cross entropy of a linear layer, a few rows at a time."""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import cross_entropy_, linear

_ELEMENTS = 2**22  # scores at a time: 16 MiB of float32


class _Loss(torch.autograd.Function):
    # The gradients are made beside the loss: the scores are not computed twice.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, smoothing: float, learns: bool):
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        nll = torch.zeros_like(loss)
        if learns:
            x_grad = torch.empty_like(x)
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        rows = max(1, _ELEMENTS // len(weight))
        for begin in range(0, len(x), rows):
            part = x[begin : begin + rows]
            grad = linear(part, weight).float()
            found = cross_entropy_(grad, target[begin : begin + rows], smoothing)
            loss += found[0]
            nll += found[1]
            if learns:
                grad = grad.to(x.dtype)
                x_grad[begin : begin + rows] = linear(grad, weight.t())
                weight_grad += linear(grad.t(), part.t())
            del grad  # for the next scores to take its memory, which the cache still holds
        if learns:
            ctx.save_for_backward(x_grad, weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad, weight_grad * grad, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """Return the loss of scores ``x @ weight.T``, with and without smoothing, and never hold all scores.

    It is fairseq's ``label_smoothed_nll_loss``: each wrong word gets label_smoothing / (V - 1). The softmax
    and the sums are in float32. Where gradients are wanted, they are made at once, and the weight's takes two
    arrays of (V, C) until the backward pass.

    Args:
        x: (N, C), float32 or bfloat16
        weight: (V, C), of the same dtype
        target: (N,), int64
        label_smoothing: from 0 to 1

    Returns:
        two sums over N, float32: the loss, differentiable once, and the negative log-likelihood, without
            gradient

    Raises:
        TypeError: another dtype
    """
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x and weight must both be float32 or bfloat16, got {x.dtype} and {weight.dtype}")
    return _Loss.apply(x, weight, target, label_smoothing, torch.is_grad_enabled())
