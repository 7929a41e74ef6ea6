"""fairseq models; importing this package registers them."""

from . import checkpoints  # noqa: F401  changes how fairseq loads them
from .deepnmt import DeepNMTModel
from .lrn import LRNModel

__all__ = ["DeepNMTModel", "LRNModel"]
