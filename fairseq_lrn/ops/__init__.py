"""The LRN recurrence as an operator."""

from .reference import lrn_scan_reference
from .scan import lrn_scan

__all__ = ["lrn_scan", "lrn_scan_reference"]
