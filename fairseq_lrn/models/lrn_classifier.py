"""The paper's document classifier: fairseq model ``lrn_classifier``."""

from fairseq.data import Dictionary
from fairseq.models import register_model
from torch import Tensor

from ..modules import AttentivePooling
from .sentence_prediction import SentencePredictionModel
from .word_encoder import WordEncoderConfig


@register_model("lrn_classifier", dataclass=WordEncoderConfig)
class LRNClassifierModel(SentencePredictionModel):
    """Bidirectional recurrence, attentive pooling, classification heads (Zhang and Sennrich, 2019)."""

    def __init__(self, cfg: WordEncoderConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg, dictionary)
        self.feature_size = self.encoder.output_size
        self.pooling = AttentivePooling(self.feature_size)

    def extract_features(self, src_tokens: Tensor) -> Tensor:
        """Map word ids (B, T), padded on either side, to features (B, C)."""
        return self.pooling(*self.encoder(src_tokens))
