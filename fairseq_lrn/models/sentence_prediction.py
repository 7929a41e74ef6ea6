"""Shared by the models for fairseq's task and criterion ``sentence_prediction``."""

from typing import Any, Dict, Optional, Tuple

import torch.nn as nn
from fairseq.data import Dictionary
from fairseq.models.roberta.model import RobertaClassificationHead
from torch import Tensor

from .base import NoTorchScript
from .heads import ModelWithHeads
from .word_encoder import WordEncoder, WordEncoderConfig


class SentencePredictionModel(NoTorchScript, ModelWithHeads):
    """Words, recurrence, one vector of features a sentence, and classification heads over it.

    A subclass names its ``config`` and defines ``feature_size`` and :meth:`extract_features`.

    Args:
        cfg: a :class:`~fairseq_lrn.models.word_encoder.WordEncoderConfig`
        dictionary: of the words

    Raises:
        ValueError: as :class:`~fairseq_lrn.models.word_encoder.WordEncoder`, or the options ask for
            characters
    """

    config = WordEncoderConfig

    def __init__(self, cfg: WordEncoderConfig, dictionary: Dictionary) -> None:
        super().__init__()
        if cfg.char_embed_dim != 0:
            raise ValueError(
                f"--char-embed-dim is {cfg.char_embed_dim}, but must be 0: the task sentence_prediction has "
                "words only"
            )
        self.cfg = self.args = cfg  # fairseq 0.12.2's criterion looks at args
        self.encoder = WordEncoder(cfg, dictionary)
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "SentencePredictionModel":
        """Build a model from its configuration (or a namespace) for ``task``'s dictionary of words.

        Raises:
            ValueError: as :meth:`check_task`
        """
        cls.check_task(getattr(task, "cfg", None))
        return cls(cls.config.from_namespace(cfg), task.source_dictionary)

    @classmethod
    def check_task(cls, cfg: Any) -> None:
        """Raise ValueError if the task's configuration ``cfg`` asks for other inputs than words."""
        for name in ("add_prev_output_tokens", "d2v2_multi"):
            if getattr(cfg, name, False):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is given, but must not be: {cls.__name__} reads words only")

    def register_classification_head(
        self, name: str, num_classes: int, inner_dim: Optional[int] = None
    ) -> None:
        """Add fairseq's classification head: a tanh layer of ``inner_dim`` (C if None), then scores."""
        self.classification_heads[name] = RobertaClassificationHead(
            self.feature_size, inner_dim or self.feature_size, num_classes, "tanh", self.cfg.dropout
        )

    def head_of(self, key: str) -> Optional[str]:
        """Return "classification head (NAME)" for that head's parameters."""
        parts = key.split(".")
        return f"classification head ({parts[1]})" if parts[0] == "classification_heads" else None

    def get_targets(self, sample: Dict[str, Any], net_output: Any) -> Tensor:
        """Return the labels (B, 1).

        Raises:
            ValueError: the data have no labels
        """
        if "target" not in sample:
            raise ValueError("the data has no labels: its folder label lacks the split that is read")
        return sample["target"]

    def extract_features(self, src_tokens: Tensor) -> Tensor:
        """Map word ids (B, T), padded on either side, to features (B, ``feature_size``)."""
        raise NotImplementedError

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        features_only: bool = True,
        classification_head_name: Optional[str] = None,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Classify a batch of sentences, padded on either side.

        Args:
            src_tokens: (B, T) word ids
            src_lengths: not needed
            features_only: not needed: there are only features and heads
            classification_head_name: a registered head

        Returns:
            scores (B, num_classes) of that head, or the features (B, C) without one, and an empty dict
        """
        x = self.extract_features(src_tokens)
        if classification_head_name is not None:
            # fairseq's head reads the first of several positions
            x = self.classification_heads[classification_head_name](x.unsqueeze(1))
        return x, {}
