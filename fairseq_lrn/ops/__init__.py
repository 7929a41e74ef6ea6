"""Operators: the LRN recurrence, linear layers, attention, dropout, and losses and best words of scores."""

from . import flops  # noqa: F401  registers what it counts
from .attention import attention
from .cross_entropy import cross_entropy_
from .dropout import dropout
from .linear import linear
from .log_softmax_topk import log_softmax_topk
from .reference import lrn_scan_reference
from .scan import lrn_scan

__all__ = [
    "attention",
    "cross_entropy_",
    "dropout",
    "linear",
    "log_softmax_topk",
    "lrn_scan",
    "lrn_scan_reference",
]
