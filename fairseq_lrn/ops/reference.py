"""The LRN recurrence in plain PyTorch: the definition that every kernel is tested against."""

from typing import Optional

import torch
from torch import Tensor


def lrn_scan_reference(
    projections: Tensor,
    initial_state: Optional[Tensor] = None,
    padding_mask: Optional[Tensor] = None,
    activation: str = "tanh",  # this and the rest by keyword; TorchScript has no keyword-only ones
    output_gate: bool = False,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """The same function as :func:`fairseq_lrn.ops.lrn_scan`, step by step in PyTorch operators.

    Differentiable, on any device; the state is kept in float32, or in float64 for float64 input.
    """
    steps, batch, width = projections.shape
    parts = 4 if output_gate else 3
    directions = 2 if bidirectional else 1
    size = width // (parts * directions)
    state_dtype = torch.promote_types(projections.dtype, torch.float32)

    outputs = []
    for direction in range(directions):
        start = direction * parts * size
        qkv = projections[:, :, start : start + parts * size].to(state_dtype)
        if padding_mask is not None:  # where it is not finite, "where" below has no finite gradient
            qkv = qkv.masked_fill(padding_mask.t().unsqueeze(2), 0.0)
        if initial_state is None:
            h = qkv.new_zeros([batch, size])
        else:
            h = initial_state[:, direction * size : (direction + 1) * size].to(state_dtype)
        backwards = reverse or direction == 1
        states = []
        for step in range(steps):
            t = steps - 1 - step if backwards else step
            q, k, v = qkv[t, :, :size], qkv[t, :, size : 2 * size], qkv[t, :, 2 * size : 3 * size]
            i, f = torch.sigmoid(k + h), torch.sigmoid(q - h)
            new = i * v + f * h
            if activation == "tanh":
                new = torch.tanh(new)
            if output_gate:
                new = torch.sigmoid(qkv[t, :, 3 * size :] - new) * new
            h = new if padding_mask is None else torch.where(padding_mask[:, t, None], h, new)
            states.append(h)
        if backwards:
            states.reverse()
        outputs.append(torch.stack(states) if steps > 0 else qkv[:, :, :size])
    return torch.cat(outputs, dim=2).to(projections.dtype)
