"""Recurrent units as ``nn.Module``s."""

from .lrn import LRN
from .recurrent import CELLS, build_recurrent

__all__ = ["CELLS", "LRN", "build_recurrent"]
