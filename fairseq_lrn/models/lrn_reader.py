"""The paper's model for reading comprehension: fairseq model ``lrn_reader``."""

from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from ..modules import AttentivePooling, LockedDropout, StepAttention, build_cell, build_recurrent
from .base import NoTorchScript
from .word_encoder import WordEncoder, WordEncoderConfig


class GatedAttention(nn.Module):
    """Join each token with its context in a memory, with a gate over both (Wang et al., ACL 2017)::

        a = softmax(relu(x W) · relu(m U) / sqrt(C / 2))        y = [x, a m]        output = sigmoid(y V) ⊙ y

    Args:
        size: width C of tokens and memory, even
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size // 2, bias=False)
        self.key = nn.Linear(size, size // 2, bias=False)
        self.gate = nn.Linear(2 * size, 2 * size, bias=False)

    def forward(self, x: Tensor, memory: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """Map tokens (T, B, C) to (T, B, 2·C); ``padding_mask`` (B, S) is of the memory (S, B, C)."""
        query, key = (torch.relu(f(y)).transpose(0, 1) for f, y in ((self.query, x), (self.key, memory)))
        attn_mask = None if padding_mask is None else padding_mask.logical_not()[:, None]
        found = F.scaled_dot_product_attention(query, key, memory.transpose(0, 1), attn_mask)
        y = torch.cat([x, found.transpose(0, 1)], 2)
        return torch.sigmoid(self.gate(y)) * y


@register_model("lrn_reader", dataclass=WordEncoderConfig)
class LRNReaderModel(NoTorchScript, BaseFairseqModel):
    """R-Net (Wang et al., ACL 2017) with any recurrent unit (Zhang and Sennrich, ACL 2019).

    One encoder reads question and passage. The passage attends to the question and is read again. Then it
    attends to itself and is read again. A pointer, additive attention over the passage, scores the answer's
    first token with the pooled question as query. The unit then makes one step: its state is the question,
    its input is what the first scores attend to. The pointer scores the last token with the new state.

    As in the code of the LRN paper's authors, both attentions are scaled dot products over whole sequences,
    and no recurrence waits for them. Three things are simpler than there. Only the encoder's last layer is
    used, not all layers. A convolution reads the characters, not a recurrence. There is no ELMo.

    Args:
        cfg: a :class:`~fairseq_lrn.models.word_encoder.WordEncoderConfig`
        dictionary: of the words
        max_word_length: bytes given of each word

    Raises:
        ValueError: as :class:`~fairseq_lrn.models.word_encoder.WordEncoder`
    """

    def __init__(self, cfg: WordEncoderConfig, dictionary: Dictionary, max_word_length: int) -> None:
        super().__init__()
        self.encoder = WordEncoder(cfg, dictionary, max_word_length)
        size = self.encoder.output_size
        cell, activation = str(cfg.cell), str(cfg.cell_activation)
        self.attentions = nn.ModuleList(GatedAttention(size) for _ in range(2))
        self.rnns = nn.ModuleList(
            build_recurrent(cell, 2 * size, cfg.encoder_hidden_size, True, activation) for _ in range(2)
        )
        self.dropout = LockedDropout(cfg.dropout)
        self.pooling = AttentivePooling(size)
        self.pointer = StepAttention(size, size)
        self.cell = build_cell(cell, size, size, activation)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "LRNReaderModel":
        """Build a model from its configuration (or a namespace) for the task ``reading_comprehension``."""
        cfg = WordEncoderConfig.from_namespace(cfg)
        return cls(cfg, task.source_dictionary, task.cfg.max_word_length)

    def forward(
        self, question_tokens: Tensor, question_chars: Tensor, passage_tokens: Tensor, passage_chars: Tensor
    ) -> Tensor:
        """Score the passages' tokens as the first and as the last one of the answers.

        Args:
            question_tokens: (B, S) word ids, padded on either side
            question_chars: (B, S, max_word_length) bytes of each word, as
                :func:`~fairseq_lrn.tasks.words.encode_chars` gives them
            passage_tokens: (B, T) word ids, padded on either side
            passage_chars: (B, T, max_word_length)

        Returns:
            scores before the softmax over T, (B, 2, T), minus infinity at padding
        """
        question, question_mask = self.encoder(question_tokens, question_chars)
        x, passage_mask = self.encoder(passage_tokens, passage_chars)
        for attention, rnn, with_question in zip(self.attentions, self.rnns, (True, False)):
            memory, mask = (question, question_mask) if with_question else (x, passage_mask)
            x = self.dropout(rnn(attention(x, memory, mask), None, passage_mask)[0])
        pooled = self.pooling(question, question_mask)
        keys, x = self.pointer.project(x, passage_mask)
        start = self.pointer.scores(pooled, keys, passage_mask).squeeze(1)
        found = torch.einsum("bt,tbc->bc", start.softmax(1), x)
        # LSTM's state is h | c, and c begins with zeros
        state = F.pad(pooled, (0, self.cell.state_size - pooled.size(1)))
        query, _ = self.cell.step(self.cell.project(found), state)
        end = self.pointer.scores(query, keys, passage_mask).squeeze(1)
        return torch.stack([start, end], 1)
