"""Here this package's modules and models choose how a linear layer is computed."""

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as hooks

from ..ops import linear

_FORWARD = nn.Linear.forward  # others may replace it later


def is_plain(module: nn.Module, kind: Any) -> bool:
    """Whether ``module`` is exactly a ``kind``: it has no hooks, and its ``forward`` was not replaced."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        and not (hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
    )


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a plain ``nn.Linear`` uses the faster :func:`~fairseq_lrn.ops.linear`.

    Any other module is called: adapters, quantized layers, layers with hooks or parametrizations. TorchScript
    takes no module as an argument, so there a caller calls the layer itself.
    """
    plain = is_plain(layer, nn.Linear) and type(layer.weight) in (nn.Parameter, Tensor)
    plain = plain and nn.Linear.forward is _FORWARD
    return linear(x, layer.weight, layer.bias) if plain and isinstance(x, Tensor) else layer(x)
