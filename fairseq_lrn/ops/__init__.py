"""Operators: the LRN recurrence, a linear layer, and the best words of a softmax for beam search."""

from . import flops  # noqa: F401  registers what it counts
from .linear import linear
from .log_softmax_topk import log_softmax_topk
from .reference import lrn_scan_reference
from .scan import lrn_scan

__all__ = ["linear", "log_softmax_topk", "lrn_scan", "lrn_scan_reference"]
