"""Linear layers by the faster of two libraries, where nothing else was made of them."""

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..ops import linear


def is_plain(module: nn.Module, kind: Any) -> bool:
    """Whether ``module`` does what its type ``kind`` does: it has no hooks and no ``forward`` of its own."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        and not (_global_forward_hooks or _global_forward_pre_hooks)
    )


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; by the faster :func:`~fairseq_lrn.ops.linear` where it is a plain ``nn.Linear``."""
    if is_plain(layer, nn.Linear) and type(layer.weight) in (nn.Parameter, Tensor):
        return linear(x, layer.weight, layer.bias)
    return layer(x)
