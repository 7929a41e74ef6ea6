"""fairseq models; importing this package registers them."""

from .lrn import LRNModel

__all__ = ["LRNModel"]
