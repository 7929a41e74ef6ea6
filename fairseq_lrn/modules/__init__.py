"""Recurrent units as ``nn.Module``s, and attention for recurrences that wait for it."""

from .attention import StepAttention
from .lrn import LRN
from .mixture_of_softmaxes import MixtureOfSoftmaxes
from .pooling import AttentivePooling
from .recurrent import CELLS, LockedDropout, StackedRecurrent, Unrolled, build_cell, build_recurrent

__all__ = [
    "CELLS",
    "LRN",
    "AttentivePooling",
    "LockedDropout",
    "MixtureOfSoftmaxes",
    "StackedRecurrent",
    "StepAttention",
    "Unrolled",
    "build_cell",
    "build_recurrent",
]
