"""Dropout that is cheap on the CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import eager, loaded


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout``: zero each element of ``x`` with probability ``p``, and divide the others by 1 - p.

    On the CPU one operator draws the numbers, 16 random bits for an element, from a seed that PyTorch's
    generator gives. It draws them again for the gradient, so no mask is stored. p is rounded to a multiple of
    2**-16. It serves float32 and bfloat16. Tracing, compiling and ``torch.func`` use ``F.dropout``.

    Args:
        x: of any shape, dtype and device
        p: probability, between 0 and 1

    Returns:
        as ``x``
    """
    if not torch.jit.is_scripting():
        fast = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        fast = fast and x.layout == torch.strided and not x.is_nested
        if loaded and fast and 0 <= p < 1 - 2**-16 and eager():
            seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)
            return torch.ops.fairseq_lrn.dropout(x, p, int(seed))
    return F.dropout(x, p)
