"""The encoder of the ``deepnmt`` model."""

from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.models import FairseqEncoder
from fairseq.models.transformer import Linear
from torch import Tensor

from ..modules import build_cell, build_recurrent
from ..modules.linear import project
from .base import Dropout, find_padding, reorder_sentences


class ContextAwareRecurrent(nn.Module):
    """A backward recurrence that reads at each step the source, then a forward recurrence's state.

    The context-aware encoder of Zhang et al. (2017), called as :class:`~fairseq_lrn.modules.LRN` is.
    """

    def __init__(self, cell: str, size: int, activation: str) -> None:
        super().__init__()
        self.context = build_recurrent(cell, size, size, activation=activation)
        self.first = build_cell(cell, size, size, activation)
        self.second = build_cell(cell, size, size, activation)

    def forward(
        self, x: Tensor, hx: Optional[Tensor], padding_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Map (T, B, C) to (T, B, C) and the last state (1, B, ``state_size``); ``hx`` must be None."""
        context, _ = self.context(x, None, padding_mask)
        x, context = self.first.project(x), self.second.project(context)
        if hasattr(self.second, "scan"):
            # both recurrences are one, over twice as many steps
            steps = torch.stack([context, x], 1).flatten(0, 1)
            mask = None if padding_mask is None else padding_mask.repeat_interleave(2, 1)
            output = self.second.scan(steps, None, mask, reverse=True)[::2]
            return output, output[:1]
        state = x.new_zeros(x.size(1), self.second.state_size)
        outputs: List[Tensor] = []
        for t in range(x.size(0) - 1, -1, -1):
            output, new = self.second.step(context[t], self.first.step(x[t], state)[1])
            state = new if padding_mask is None else state.where(padding_mask[:, t : t + 1], new)
            outputs.append(output)
        return torch.stack(outputs[::-1]), state[None]


class DeepNMTEncoder(FairseqEncoder):
    """Embeddings, a bidirectional or context-aware recurrent layer, and further forward layers.

    After each layer come a linear map, dropout, the residual sum and, if asked for, layer normalisation.

    Args:
        cfg: a :class:`~fairseq_lrn.models.deepnmt.DeepNMTConfig`
        dictionary: the source :class:`~fairseq.data.Dictionary`
        embed_tokens: ``nn.Embedding`` of width ``cfg.encoder_embed_dim``
    """

    def __init__(self, cfg, dictionary, embed_tokens):
        super().__init__(dictionary)
        size, cell, activation = cfg.encoder_embed_dim, str(cfg.cell), cfg.activation
        self.embed_tokens = embed_tokens
        self.embed_bias = nn.Parameter(torch.zeros(size))
        self.padding_idx = embed_tokens.padding_idx
        self.max_source_positions = cfg.max_source_positions
        self.dropout_module = Dropout(cfg.dropout, self.__class__.__name__)
        if cfg.context_aware_encoder:
            first, width = ContextAwareRecurrent(cell, size, activation), size
        else:
            first, width = build_recurrent(cell, size, size, True, activation), 2 * size
        upper = [
            build_recurrent(cell, size, size, activation=activation) for _ in range(cfg.encoder_layers - 1)
        ]
        self.rnns = nn.ModuleList([first, *upper])
        self.projections = nn.ModuleList([Linear(width, size), *(Linear(size, size) for _ in upper)])
        self.layer_norms = nn.ModuleList(
            nn.LayerNorm(size) if cfg.layer_norm else nn.Identity() for _ in self.rnns
        )

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        token_embeddings: Optional[Tensor] = None,
    ) -> Dict[str, List[Tensor]]:
        """Encode a batch of sentences, padded on the left or on the right.

        Args:
            src_tokens: (B, S) token ids
            src_lengths: not used; ``src_tokens`` show the padding
            return_all_hiddens: return the first layer's input and each layer's output
            token_embeddings: (B, S, C), instead of the embeddings of ``src_tokens``

        Returns:
            a dictionary: ``encoder_out`` [(S, B, C)]; ``encoder_padding_mask`` [(B, S)], True at padding, []
            without any; ``encoder_states`` [(S, B, C)], [] unless asked for; ``encoder_state`` [(1, B, C or,
            with LSTM, 2·C)], the last layer's last state
        """
        padding_mask = find_padding(src_tokens, self.padding_idx)
        if token_embeddings is None:
            x = self.embed_tokens(src_tokens.t())
        else:
            x = token_embeddings.transpose(0, 1)
        x = self.dropout_module(x + self.embed_bias)
        state, states = x[:1], [x]
        for rnn, projection, layer_norm in zip(self.rnns, self.projections, self.layer_norms):
            y, state = rnn(x, None, padding_mask)
            x = layer_norm(x + self.dropout_module(project(projection, y)))
            states.append(x)
        return {
            "encoder_out": [x],
            "encoder_padding_mask": [] if padding_mask is None else [padding_mask],
            "encoder_states": states if return_all_hiddens else [],
            "encoder_state": [state[:1]],
        }

    def reorder_encoder_out(self, encoder_out: Dict[str, List[Tensor]], new_order: Tensor):
        """Return ``encoder_out`` for rows ``new_order`` (N'), as :func:`~.base.reorder_sentences` does."""
        return reorder_sentences(encoder_out, new_order)

    def max_positions(self) -> int:
        """Maximum source length in tokens."""
        return self.max_source_positions
