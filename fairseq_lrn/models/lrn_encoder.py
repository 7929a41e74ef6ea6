"""The encoder of the ``lrn`` model."""

import math
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from fairseq.models import FairseqEncoder
from torch import Tensor

from .base import find_padding, prepared, reorder_sentences
from .lrn_layers import LRNEncoderLayer, build_embedding_dropout, build_layers


class LRNEncoder(FairseqEncoder):
    """Embeddings and ``cfg.encoder_layers`` blocks of bidirectional LRN and feed-forward.

    There are no positional embeddings: the recurrence knows the order.

    Args:
        cfg: an :class:`~fairseq_lrn.models.lrn.LRNConfig`
        dictionary: the source :class:`~fairseq.data.Dictionary`
        embed_tokens: ``nn.Embedding`` of width ``cfg.encoder_embed_dim``
    """

    __jit_ignored_attributes__ = ("translator",)

    def __init__(self, cfg, dictionary, embed_tokens):
        super().__init__(dictionary)
        self.embed_tokens = embed_tokens
        self.padding_idx = embed_tokens.padding_idx
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(cfg.encoder_embed_dim)
        self.max_source_positions = cfg.max_source_positions
        self.dropout_module = build_embedding_dropout(cfg, self.__class__.__name__)
        self.layers = build_layers(LRNEncoderLayer, cfg, cfg.encoder_layers, cfg.encoder_layerdrop)
        self.compiled = bool(cfg.compile)
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)
        self.translator: Any = None

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
            without any; ``encoder_states`` [(S, B, C)], [] unless asked for
        """
        if not torch.jit.is_scripting():
            other = return_all_hiddens or token_embeddings is not None
            native = None if other else prepared(self)
            if native is not None:
                return self.translator.encode(native, src_tokens)
        padding_mask = find_padding(src_tokens, self.padding_idx, self.compiled)
        if token_embeddings is None:
            x = self.embed_tokens(src_tokens.t())
        else:
            x = token_embeddings.transpose(0, 1)
        x = self.dropout_module(self.embed_scale * x)
        states = [x]
        for layer in self.layers:
            x = layer(x, padding_mask)
            if return_all_hiddens:
                states.append(x)
        return {
            "encoder_out": [self.layer_norm(x)],
            "encoder_padding_mask": [] if padding_mask is None else [padding_mask],
            "encoder_states": states if return_all_hiddens else [],
        }

    @torch.jit.export
    def reorder_encoder_out(self, encoder_out: Dict[str, List[Tensor]], new_order: Tensor):
        """Return ``encoder_out`` for rows ``new_order`` (N'), as :func:`~.base.reorder_sentences` does."""
        return reorder_sentences(encoder_out, new_order)

    def max_positions(self) -> int:
        """Maximum source length in tokens."""
        return self.max_source_positions
