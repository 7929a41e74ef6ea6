"""Recurrent units as ``nn.Module``s."""

from .lrn import LRN

__all__ = ["LRN"]
