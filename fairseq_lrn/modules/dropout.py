"""Dropout whose random numbers are cheap on the CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._library import eager


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout``: zero each element of ``x`` with probability ``p``, and divide the others by 1 - p.

    On the CPU 16 random bits decide an element, and p is rounded to a multiple of 2**-16. ``F.dropout`` draws
    a number for each element, which takes most of its time. Tracing, compiling and ``torch.func`` use
    ``F.dropout``.

    Args:
        x: of any shape, dtype and device
        p: probability, between 0 and 1

    Returns:
        as ``x``
    """
    if not torch.jit.is_scripting():
        fast = x.device.type == "cpu" and 0 <= p < 1 - 2**-16 and eager()
        if fast:
            drop = round(p * 2**16)
            words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
            keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= drop - 2**15
            return x * keep.to(x.dtype).mul_(2**16 / (2**16 - drop))
    return F.dropout(x, p)
