"""fairseq models. Importing this package registers them and applies fairseq_patches."""

from .. import fairseq_patches
from .deepnmt import DeepNMTModel
from .lrn import LRNModel
from .lrn_classifier import LRNClassifierModel
from .lrn_inference import LRNInferenceModel
from .lrn_lm import LRNLanguageModel
from .lrn_reader import LRNReaderModel
from .lrn_tagger import LRNTaggerModel

__all__ = [
    "DeepNMTModel",
    "LRNClassifierModel",
    "LRNInferenceModel",
    "LRNLanguageModel",
    "LRNModel",
    "LRNReaderModel",
    "LRNTaggerModel",
]

fairseq_patches.apply()
