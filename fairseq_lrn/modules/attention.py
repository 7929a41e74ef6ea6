"""Attention of one query at a time over a memory, for recurrences that depend on its result."""

from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .inputs import check_sequences, zero_padding
from .linear import project


class StepAttention(nn.Module):
    """Multi-head attention whose keys are computed once a sequence. Each head reads a part of the memory.

    Additive: a head's score of a key is w · tanh(query W + memory U) (Bahdanau et al., 2015). Dot: it is the
    scaled product of the two (Vaswani et al., 2017).

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

    def project(self, memory: Tensor, padding_mask: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """Return the keys (S, B, C) of a memory (S, B, C), and the memory with zeros at padding.

        Raises:
            ValueError: ``memory`` has another shape, or ``padding_mask`` (B, S) does not fit it
            TypeError: a dtype is wrong
        """
        check_sequences("memory", memory, self.key.in_features, self.key.weight)
        if padding_mask is not None:
            memory = zero_padding(memory, padding_mask)
        return project(self.key, memory), memory

    def scores(self, query: Tensor, keys: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Return each query's score of each key, (N, num_heads, S), of the arguments of :meth:`forward`."""
        query = project(self.query, query).unflatten(0, (keys.size(1), -1))  # (B, N / B, C)
        if self.score is not None:
            # one matrix product, each head's weights beside zeros, is faster than products and sums
            weight = torch.block_diag(*self.score[:, None])
            scores = nn.functional.linear((query + keys[:, :, None]).tanh_(), weight).permute(1, 2, 3, 0)
        else:
            heads = (self.num_heads, keys.size(2) // self.num_heads)
            query = query.unflatten(2, heads) * heads[1] ** -0.5
            scores = torch.einsum("bnhd,sbhd->bnhs", query, keys.unflatten(2, heads))
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None, None], float("-inf"))
        return scores.flatten(0, 1)

    def forward(
        self, query: Tensor, keys: Tensor, memory: Tensor, padding_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Attend with N queries; the N / B of a memory are next to each other.

        Args:
            query: (N, query_dim)
            keys: (S, B, C), from :meth:`project`
            memory: (S, B, C), from :meth:`project`
            padding_mask: (B, S), True at padding

        Returns:
            context (N, C), weights (N, num_heads, S)
        """
        scores = self.scores(query, keys, padding_mask)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(2, dtype=wide).type_as(memory)
        memory = memory.unflatten(2, (self.num_heads, -1))
        context = torch.einsum("bnhs,sbhd->bnhd", weights.unflatten(0, (memory.size(1), -1)), memory)
        return context.flatten(2).flatten(0, 1), weights
