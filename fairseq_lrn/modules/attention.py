"""Attention of one query at a time over a memory, for recurrences that wait for what it finds."""

from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor


class StepAttention(nn.Module):
    """Multi-head attention whose keys are computed once a sequence; each head reads its part of the memory.

    Additive: a head's score of a key is w · tanh(query W + memory U) (Bahdanau et al., 2015); dot: the scaled
    product of the two (Vaswani et al., 2017).

    Args:
        query_dim: width of the query
        memory_dim: width C of the memory and of the context
        num_heads: divides C
        additive: score with tanh rather than with the scaled dot product

    Raises:
        ValueError: ``num_heads`` does not divide ``memory_dim``
    """

    def __init__(self, query_dim: int, memory_dim: int, num_heads: int = 1, additive: bool = True) -> None:
        super().__init__()
        if num_heads <= 0 or memory_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide memory_dim, {memory_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(query_dim, memory_dim)
        self.key = nn.Linear(memory_dim, memory_dim, bias=False)
        nn.init.xavier_uniform_(self.query.weight)
        nn.init.xavier_uniform_(self.key.weight)
        nn.init.zeros_(self.query.bias)
        self.score: Optional[nn.Parameter] = None
        if additive:
            self.score = nn.Parameter(torch.empty(num_heads, memory_dim // num_heads))
            nn.init.xavier_uniform_(self.score)

    def project(self, memory: Tensor) -> Tensor:
        """Return the keys (S, B, C) of a memory (S, B, C)."""
        return self.key(memory)

    def scores(self, query: Tensor, keys: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Return each query's score of each key, (B, num_heads, S), of the arguments of :meth:`forward`."""
        heads = (self.num_heads, -1)
        query = self.query(query)
        if self.score is not None:
            scores = (torch.tanh(query + keys).unflatten(2, heads) * self.score).sum(3)
        else:
            size = keys.size(2) // self.num_heads
            scores = (query.unflatten(1, heads) * keys.unflatten(2, heads)).sum(3) * size**-0.5
        scores = scores.permute(1, 2, 0)
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None], float("-inf"))
        return scores

    def forward(
        self, query: Tensor, keys: Tensor, memory: Tensor, padding_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Look for each of B queries.

        Args:
            query: (B, query_dim)
            keys: (S, B, C), from :meth:`project`
            memory: (S, B, C)
            padding_mask: (B, S), True at padding

        Returns:
            context (B, C), weights (B, num_heads, S)
        """
        scores = self.scores(query, keys, padding_mask)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(2, dtype=wide).type_as(memory)
        context = torch.einsum("bhs,sbhd->bhd", weights, memory.unflatten(2, (self.num_heads, -1)))
        return context.flatten(1), weights
