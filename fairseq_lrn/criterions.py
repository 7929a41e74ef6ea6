"""fairseq's criteria, made for the models of this package."""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.distributed import FullyShardedDataParallel
from torch import Tensor

from .inference.generator import is_unchanged
from .modules.linear import is_plain
from .modules.loss import linear_cross_entropy


@register_criterion(
    "chunked_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig
)
class ChunkedCriterion(LabelSmoothedCrossEntropyCriterion):
    """``label_smoothed_cross_entropy`` in less memory: it computes the scores of a few words at a time.

    This is for ``lrn`` and ``deepnmt`` in float32 and bfloat16. Other cases use fairseq's criterion: other
    and changed models, float16, autocast, FSDP, an output projection that is not a plain ``nn.Linear``,
    ``--find-unused-parameters``, ``--report-accuracy`` and ``--ignore-prefix-size``.
    """

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict]:
        """As fairseq's: the loss, the sample size and what to log."""
        weight = self.weight(model)
        if weight is None or not reduce or self.report_accuracy or self.ignore_prefix_size:
            return super().forward(model, sample, reduce)
        features, _ = model(**sample["net_input"], features_only=True)
        target = sample["target"]
        words = target.ne(self.padding_idx)
        loss, nll_loss = linear_cross_entropy(features[words], weight, target[words], self.eps)
        size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "nll_loss": nll_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": size,
        }
        return loss, size, logging_output

    @staticmethod
    def weight(model: nn.Module) -> Optional[Tensor]:
        """Return the weight of a plain output projection, or None if the projection is another module."""
        if isinstance(model, FullyShardedDataParallel):
            return None  # it has the whole weight only within forward()
        # DDP believes that parameters are unused which forward() does not reach
        if getattr(model, "find_unused_parameters", False):
            return None
        inner: Any = model
        while hasattr(inner, "module"):  # of what several processes wrap it in
            inner = inner.module
        if not (is_unchanged(inner) and is_plain(inner, type(inner))):
            return None
        projection = inner.decoder.output_projection
        if not (is_plain(inner.decoder, type(inner.decoder)) and is_plain(projection, nn.Linear)):
            return None
        weight = projection.weight
        plain = projection.bias is None and type(weight) in (nn.Parameter, Tensor)
        exact = weight.dtype in (torch.float32, torch.bfloat16) and not torch._C._is_any_autocast_enabled()
        return weight if plain and exact else None
