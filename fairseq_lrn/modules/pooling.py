"""One vector of a sequence."""

from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

from .inputs import check_sequences, zero_padding


class AttentivePooling(nn.Module):
    """The mean of a sequence's states, weighted by a learnt query (Yang et al., 2016)::

        a = softmax(u · tanh(x W + b))        output = sum of a_t x_t over the real tokens

    Args:
        size: width C of the states
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(size, size)
        self.query = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """Pool states (T, B, C) to (B, C); ``padding_mask`` (B, T) is True at padding, but not everywhere.

        Raises:
            ValueError: ``x`` has another shape, or ``padding_mask`` does not fit it
            TypeError: a dtype is wrong
        """
        check_sequences("x", x, self.projection.in_features, self.projection.weight)
        if padding_mask is not None:
            x = zero_padding(x, padding_mask)
        scores = self.query(torch.tanh(self.projection(x))).squeeze(2)
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask.t(), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(0, dtype=wide).type_as(x)
        return torch.einsum("tb,tbc->bc", weights, x)
