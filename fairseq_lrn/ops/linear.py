"""A linear layer by the faster of two libraries."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import loaded


def linear(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``F.linear``, in float32 on the CPU by oneDNN where PyTorch's own choice, MKL, is slower.

    That is on processors with AVX-512 that are not Intel's, for 32 rows and more. TorchScript,
    ``torch.compile`` and autocast get ``F.linear``.

    Args:
        input: (..., in)
        weight: (out, in)
        bias: (out,), or None

    Returns:
        (..., out)
    """
    if not torch.jit.is_scripting():
        plain = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
        special = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
        if loaded and plain and input.dim() > 1 and not special:
            return torch.ops.fairseq_lrn.linear(input, weight, bias)
    return F.linear(input, weight, bias)
