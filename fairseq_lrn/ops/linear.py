"""A linear layer, by the faster of this package's product and the BLAS."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import eager, loaded


def linear(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``F.linear``; in float32 it is faster than MKL, PyTorch's choice, on many processors.

    With AVX-512, up to 8 rows use one loop of this package. More rows use another, with AVX2 from 65 rows on,
    but not on Intel's processors, where MKL is fast. TorchScript, traced or scripted, ``torch.compile``,
    autocast and layouts other than strided use ``F.linear``.

    Args:
        input: (..., in), any strides
        weight: (out, in)
        bias: (out,), or None

    Returns:
        (..., out)

    Raises:
        ValueError: bias has another shape, which ``F.linear`` might expand
        RuntimeError: input and weight do not fit each other, as in ``F.linear``
    """
    if bias is not None and (bias.dim() != 1 or bias.size(0) != weight.size(0)):
        raise ValueError(f"bias must have shape {[weight.size(0)]}, but has {list(bias.shape)}")
    if not torch.jit.is_scripting():
        plain = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
        dense = input.layout == weight.layout == torch.strided and not input.is_nested
        special = torch._C._is_any_autocast_enabled() or not eager()
        if loaded and plain and dense and not special and input.dim() > 1:
            return torch.ops.fairseq_lrn.linear(input, weight, bias)
    return F.linear(input, weight, bias)
