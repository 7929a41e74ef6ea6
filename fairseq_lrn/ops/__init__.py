"""Operators: the LRN recurrence, a linear layer, the loss of scores, and their best words for beam search."""

from . import flops  # noqa: F401  registers what it counts
from .cross_entropy import cross_entropy_
from .linear import linear
from .log_softmax_topk import log_softmax_topk
from .reference import lrn_scan_reference
from .scan import lrn_scan

__all__ = ["cross_entropy_", "linear", "log_softmax_topk", "lrn_scan", "lrn_scan_reference"]
