"""Models with heads for a set of labels. Fine-tuning to other labels starts with new heads."""

import logging
from collections import defaultdict
from typing import Any, Dict, List, Optional

from fairseq.models import BaseFairseqModel
from torch import Tensor

logger = logging.getLogger(__name__)


class ModelWithHeads(BaseFairseqModel):
    """A model that loads a checkpoint whose heads differ from its own, as fairseq's RoBERTa does.

    Heads of the checkpoint that the model lacks, or has in another size, are dropped with a warning. The
    model's heads then keep their initial weights. This is for fine-tuning: a model refuses to resume training
    or evaluate with such a head. A subclass defines :meth:`head_of`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.new_heads: List[str] = []

    def head_of(self, key: str) -> Optional[str]:
        """Return the name of the head that the parameter ``key`` belongs to, or None."""
        raise NotImplementedError

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """Replace heads that do not fit by the model's weights, in ``state_dict``."""
        super().upgrade_state_dict_named(state_dict, name)
        saved, own = self._heads(state_dict), self._heads(self.state_dict())
        for head, weights in saved.items():
            if _shapes(weights) != _shapes(own.get(head, {})):
                reason = "with different dimensions than" if head in own else "not present in"
                logger.warning("deleting %s from checkpoint, %s current model", head, reason)
                for key in weights:
                    del state_dict[key]
        self.new_heads = [head for head, weights in own.items() if weights.keys() - state_dict.keys()]
        for head in self.new_heads:
            logger.warning("%s is not in the checkpoint: it begins with new weights", head)
            state_dict.update(own[head])

    def set_num_updates(self, num_updates: int) -> None:
        """As fairseq's, before each step of training.

        Raises:
            ValueError: training resumes, so the optimizer's state is that of another head
        """
        super().set_num_updates(num_updates)
        if self.new_heads and num_updates > 0:
            raise ValueError(
                f"{self.new_heads[0]} is not in the checkpoint that training resumes from, or has other "
                "dimensions there: fine-tune with --finetune-from-model, or --restore-file with "
                "--reset-optimizer --reset-lr-scheduler --reset-dataloader --reset-meters"
            )
        self.new_heads = []

    def train(self, mode: bool = True) -> "ModelWithHeads":
        """As PyTorch's.

        Raises:
            ValueError: evaluation begins with a head that was never trained
        """
        if self.new_heads and not mode:
            raise ValueError(
                f"{self.new_heads[0]} is not in the checkpoint, or has other dimensions there, and was not "
                "trained since: it can be fine-tuned, but not evaluated"
            )
        return super().train(mode)

    def _heads(self, state_dict: Dict[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
        """Return the parameters of each head."""
        heads: Dict[str, Dict[str, Tensor]] = defaultdict(dict)
        for key, weight in state_dict.items():
            head = self.head_of(key)
            if head is not None:
                heads[head][key] = weight
        return dict(heads)


def _shapes(weights: Dict[str, Tensor]) -> Dict[str, Any]:
    return {key: weight.shape for key, weight in weights.items()}
