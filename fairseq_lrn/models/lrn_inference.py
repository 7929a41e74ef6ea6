"""The paper's model for natural language inference: fairseq model ``lrn_inference``."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import register_model
from torch import Tensor

from ..modules import AttentivePooling, LockedDropout, StackedRecurrent
from .base import check_positive
from .sentence_prediction import SentencePredictionModel
from .word_encoder import WordEncoderConfig


@dataclass
class LRNInferenceConfig(WordEncoderConfig):
    """Options of the ``lrn_inference`` model."""

    comparison_layers: int = field(
        default=2, metadata={"help": "number of recurrent layers that read the compared sentences"}
    )


@register_model("lrn_inference", dataclass=LRNInferenceConfig)
class LRNInferenceModel(SentencePredictionModel):
    """Read two sentences, attend to each other, compare, read again, pool and classify.

    The paper's encoder, attention and two stacked bidirectional recurrences, in ESIM's form (Chen et al., ACL
    2017). Each state is joined with its context in the other sentence, and with their product and difference.
    A projection, recurrent layers and attentive pooling follow.
    """

    config = LRNInferenceConfig

    def __init__(self, cfg: LRNInferenceConfig, dictionary: Dictionary) -> None:
        check_positive(cfg, ("comparison_layers",))
        super().__init__(cfg, dictionary)
        self.eos = dictionary.eos()
        self.projection = nn.Linear(4 * self.encoder.output_size, cfg.encoder_hidden_size)
        self.dropout = LockedDropout(cfg.dropout)
        self.comparison = StackedRecurrent(
            str(cfg.cell),
            cfg.encoder_hidden_size,
            cfg.encoder_hidden_size,
            cfg.comparison_layers,
            bidirectional=True,
            dropout=cfg.dropout,
            activation=str(cfg.cell_activation),
        )
        self.pooling = AttentivePooling(self.comparison.output_size)
        self.feature_size = 2 * self.comparison.output_size

    @classmethod
    def check_task(cls, cfg: Any) -> None:
        """Raise ValueError as the base class does, and if sentences would be split at a wrong place."""
        super().check_task(cfg)
        if getattr(cfg, "init_token", None) == Dictionary().eos():
            raise ValueError("--init-token is </s>, which ends the first sentence, but must be another one")
        if getattr(cfg, "shorten_method", None) == "random_crop":
            raise ValueError(
                "--shorten-method is random_crop, which cuts within pairs, but must be none or truncate"
            )

    def extract_features(self, src_tokens: Tensor) -> Tensor:
        """Map pairs of sentences (B, T), padded on either side, to (B, C). Each sentence ends in ``</s>``.

        Raises:
            ValueError: a row does not have two sentences
        """
        x, padding_mask = self.encoder(split_pairs(src_tokens, self.eos, self.encoder.padding_idx))
        attended = attend_to_other(x, padding_mask)
        x = torch.cat([x, attended, x * attended, x - attended], 2)
        x, _ = self.comparison(self.dropout(torch.relu(self.projection(x))), None, padding_mask)
        return torch.cat(self.pooling(self.dropout(x), padding_mask).chunk(2), 1)


def split_pairs(tokens: Tensor, eos: int, padding_idx: int) -> Tensor:
    """Split pairs (B, T) after the first ``eos``: the first sentences, then the second ones, (2·B, S).

    They are padded on the right to the length S of the longest one.

    Raises:
        ValueError: a row ends with its first ``eos``, or has none
    """
    ends = tokens.eq(eos)
    second = ends.cumsum(1) > ends
    real = tokens.ne(padding_idx)
    rows = torch.cat([real & ~second, real & second])
    lengths = rows.sum(1)
    if not lengths.all():
        raise ValueError(
            f"row {int(lengths.argmin()) % len(tokens)} of src_tokens is one sentence, but must be two, each "
            "ended by </s>: the task needs input0 and input1, and both must fit in --max-positions"
        )
    # a stable sort puts what is not of the sentence, False < True, last
    order = rows.logical_not().byte().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    return tokens.repeat(2, 1).masked_fill(~rows, padding_idx).gather(1, order)


def attend_to_other(x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """Return each token's context in the other sentence of its pair, by dot products as in ESIM.

    Args:
        x: (T, 2·B, C) the first sentences' states, then the second ones'
        padding_mask: (2·B, T), True at padding

    Returns:
        (T, 2·B, C)
    """
    states = x.transpose(0, 1)
    others = states.roll(len(states) // 2, 0)
    attn_mask = None
    if padding_mask is not None:
        attn_mask = padding_mask.roll(len(padding_mask) // 2, 0).logical_not()[:, None]
    return F.scaled_dot_product_attention(states, others, others, attn_mask, scale=1.0).transpose(0, 1)
