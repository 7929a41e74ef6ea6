"""Multi-head attention whose keys and values lie ready for each head."""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import eager, loaded


def by_head(query: Tensor, keys_values: Tensor) -> Tensor:
    """Return the query (T, N, C) of :func:`attention` as (B, heads, N / B · T, d)."""
    sentences, heads, head_dim = keys_values.size(1), keys_values.size(2), keys_values.size(4)
    x = query.view(query.size(0), sentences, query.size(1) // sentences, heads, head_dim)
    return x.permute(1, 3, 2, 0, 4).flatten(2, 3)


def by_step(y: Tensor, query: Tensor) -> Tensor:
    """Return y (B, heads, N / B · T, d) in the shape of the query, (T, N, C)."""
    y = y.unflatten(2, (query.size(1) // y.size(0), query.size(0)))
    return y.permute(3, 0, 2, 1, 4).reshape(query.shape)


def attention(
    query: Tensor, keys_values: Tensor, padding_mask: Optional[Tensor] = None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(q kᵀ / √d) v of each head (Vaswani et al., 2017, equation 1).

    On the CPU one operator computes it in float32 and bfloat16, the softmax and all sums in float32. With
    dropout, autocast of float32, fewer than four queries of a sentence, other dtypes and devices,
    TorchScript, tracing and ``torch.compile``, it is PyTorch's ``scaled_dot_product_attention``, which is
    slower for sentences.

    Args:
        query: (T, N, C). N is B or a multiple of it; the rows of a sentence are next to each other.
        keys_values: (2, B, heads, S, d) of query's dtype, heads · d = C
        padding_mask: (B, S) or (1, S), True at padding. Nothing but padding gives zeros.
        dropout: probability of the weights'

    Returns:
        (T, N, C), differentiable once

    Raises:
        ValueError: query or keys_values has another number of axes, or there is no sentence
        RuntimeError: a size, dtype or device does not fit
    """
    if query.dim() != 3 or keys_values.dim() != 5 or keys_values.size(1) == 0:
        raise ValueError(
            "query must be (T, N, C) and keys_values (2, B, heads, S, d), with B > 0, got "
            f"{list(query.shape)} and {list(keys_values.shape)}"
        )
    sentences = keys_values.size(1)
    if not torch.jit.is_scripting():
        fast = dropout == 0 and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
        fast = fast and keys_values.dtype == query.dtype and query.size(0) * (query.size(1) // sentences) >= 4
        fast = fast and (query.dtype == torch.bfloat16 or not torch._C._is_any_autocast_enabled())
        if loaded and fast and eager():
            if padding_mask is not None:
                padding_mask = padding_mask.to(torch.bool).expand(sentences, keys_values.size(3))
            return torch.ops.fairseq_lrn.attention(query, keys_values, padding_mask)
    mask = None if padding_mask is None else padding_mask.logical_not()[:, None, None]
    y = F.scaled_dot_product_attention(
        by_head(query, keys_values), keys_values[0], keys_values[1], mask, dropout
    )
    return by_step(y, query)
