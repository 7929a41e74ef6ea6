"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators."""

from typing import Any, Sequence

import torch
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ._library import loaded


def linear_flop(input: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Two operations for each product of two matrices' elements, as PyTorch counts ``addmm``."""
    rows = 1
    for size in input[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


def lrn_scan_flop(projections: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """One operation for each +, -, *, sigmoid and tanh of the formulas in ``lrn_scan``."""
    steps, batch, width = projections
    gate = kwargs.get("output_gate", False)
    operations = 7 + (kwargs.get("activation", "tanh") == "tanh") + 3 * gate
    return operations * steps * batch * (width // (4 if gate else 3))


def lrn_scan_backward_flop(grad_output: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Twice :func:`lrn_scan_flop`, as PyTorch counts a backward pass that computes two gradients."""
    return 2 * lrn_scan_flop(*args, **kwargs)


if loaded:  # register_flop_formula of PyTorch 2.4 takes no operators but PyTorch's own
    for _operator, _formula in (
        (torch.ops.fairseq_lrn.linear, linear_flop),
        (torch.ops.fairseq_lrn.lrn_scan, lrn_scan_flop),
        (torch.ops.fairseq_lrn.lrn_scan_backward, lrn_scan_backward_flop),
    ):
        flop_registry.setdefault(_operator, shape_wrapper(_formula))
