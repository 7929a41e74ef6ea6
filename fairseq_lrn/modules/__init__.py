"""Recurrent units as ``nn.Module``s, and attention for recurrences that wait for it."""

from .attention import StepAttention
from .lrn import LRN
from .recurrent import CELLS, LockedDropout, StackedRecurrent, Unrolled, build_cell, build_recurrent

__all__ = [
    "CELLS",
    "LRN",
    "LockedDropout",
    "StackedRecurrent",
    "StepAttention",
    "Unrolled",
    "build_cell",
    "build_recurrent",
]
