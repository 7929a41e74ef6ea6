"""Recurrent units as ``nn.Module``s, and attention for recurrences that wait for it."""

from .attention import StepAttention
from .lrn import LRN
from .recurrent import CELLS, Unrolled, build_cell, build_recurrent

__all__ = ["CELLS", "LRN", "StepAttention", "Unrolled", "build_cell", "build_recurrent"]
