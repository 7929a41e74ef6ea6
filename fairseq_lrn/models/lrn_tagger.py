"""The paper's tagger: fairseq model ``lrn_tagger``."""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.data import Dictionary
from fairseq.models import register_model
from torch import Tensor

from .base import NoTorchScript
from .heads import ModelWithHeads
from .word_encoder import WordEncoder, WordEncoderConfig


@register_model("lrn_tagger", dataclass=WordEncoderConfig)
class LRNTaggerModel(NoTorchScript, ModelWithHeads):
    """Bidirectional recurrence and a conditional random field over the tags (Zhang and Sennrich, 2019).

    For the task ``tagging`` and fairseq's criterion ``model``.

    Args:
        cfg: a :class:`~fairseq_lrn.models.word_encoder.WordEncoderConfig`
        dictionary: of the words
        tags: dictionary of the N tags
        max_word_length: bytes given of each word, where ``cfg.char_embed_dim`` is not 0

    Raises:
        ImportError: the package pytorch-crf is not installed
        ValueError: as :class:`~fairseq_lrn.models.word_encoder.WordEncoder`
    """

    def __init__(
        self, cfg: WordEncoderConfig, dictionary: Dictionary, tags: Dictionary, max_word_length: int
    ) -> None:
        try:
            from torchcrf import CRF
        except ImportError as error:
            raise ImportError("lrn_tagger needs the package pytorch-crf: pip install pytorch-crf") from error
        super().__init__()
        self.first_tag = tags.nspecial
        self.encoder = WordEncoder(cfg, dictionary, max_word_length)
        self.projection = nn.Linear(self.encoder.output_size, len(tags) - tags.nspecial)
        self.crf = CRF(self.projection.out_features, batch_first=True)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "LRNTaggerModel":
        """Build a model from its configuration (or a namespace) for ``task``, a ``TaggingTask``."""
        cfg = WordEncoderConfig.from_namespace(cfg)
        return cls(cfg, task.source_dictionary, task.target_dictionary, task.cfg.max_word_length)

    def head_of(self, key: str) -> Optional[str]:
        """Return "tagging head" for the parameters of the random field and of its scores."""
        return "tagging head" if key.startswith(("projection.", "crf.")) else None

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor, src_chars: Optional[Tensor] = None
    ) -> Dict[str, Tensor]:
        """Score each tag of each word, for the random field.

        Args:
            src_tokens: (B, T) word ids of sentences with at least one word, padded on the right
            src_lengths: (B,) words of each sentence
            src_chars: (B, T, max_word_length) bytes of each word, from
                :func:`~fairseq_lrn.tasks.words.encode_chars`, if the model reads them

        Returns:
            ``emissions`` (B, T, N), ``mask`` (B, T), False at padding, and ``sample_size``, the words
        """
        x, _ = self.encoder(src_tokens, src_chars)
        return {
            "emissions": self.projection(x.transpose(0, 1)),
            "mask": src_tokens.ne(self.encoder.padding_idx),
            "sample_size": src_lengths.sum(),
        }

    def get_losses(self, net_output: Dict[str, Tensor], sample: Dict[str, Any]) -> Dict[str, Tensor]:
        """Return the negative log-likelihood of ``sample["target"]`` (B, T), summed over the batch."""
        tags = (sample["target"] - self.first_tag).clamp(min=0)  # any tag at padding, which does not count
        nll = -self._log_probability(net_output, tags).sum()
        # one word has no transition, and DistributedDataParallel wants a gradient of every parameter
        return {"nll": nll + 0 * self.crf.transitions.float().sum()}

    def decode(self, net_output: Dict[str, Tensor]) -> List[Tuple[Tensor, Tensor]]:
        """Return each sentence's most probable tags (T_i,), found by Viterbi, and their log-probability."""
        emissions, mask = net_output["emissions"].float(), net_output["mask"]
        paths = [torch.tensor(path, device=mask.device) for path in self.crf.decode(emissions, mask)]
        scores = self._log_probability(net_output, nn.utils.rnn.pad_sequence(paths, batch_first=True))
        return [(path + self.first_tag, score) for path, score in zip(paths, scores)]

    def _log_probability(self, net_output: Dict[str, Tensor], tags: Tensor) -> Tensor:
        # In float32 whatever the parameters are: a half type is too coarse for sums over a sentence.
        parameters = {name: parameter.float() for name, parameter in self.crf.named_parameters()}
        arguments = (net_output["emissions"].float(), tags, net_output["mask"])
        return torch.func.functional_call(self.crf, parameters, arguments, {"reduction": "none"})
