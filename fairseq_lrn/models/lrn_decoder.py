"""The decoder of the ``lrn`` model."""

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..modules.linear import project
from ..ops._library import eager
from .base import (
    build_adaptive_softmax,
    build_output_projection,
    find_padding,
    pick_sentences,
    prepared,
    refuse_full_context,
)
from .encoder_decoder import Decoder
from .lrn_layers import LRNDecoderLayer, build_embedding_dropout, build_layers


def split_by_length(padding_mask: Tensor, width: int) -> List[Tuple[Tensor, int]]:
    """Split a batch where that saves the most padding: into its shorter and its longer sentences.

    Args:
        padding_mask: (B, T), True at padding, which is at the end
        width: of a position's vector, a measure of the time that it takes

    Returns:
        the indices of each part's sentences, and the length of its longest one; no parts if that saves too
        little
    """
    if padding_mask.numel() * width < 2**15:
        return []
    batch, steps = padding_mask.shape
    ends = torch.arange(1, steps + 1, device=padding_mask.device)
    lengths, order = (~padding_mask * ends).amax(1).clamp(min=1).sort()
    saved = torch.arange(1, batch + 1, device=padding_mask.device) * (steps - lengths)
    last = int(saved.argmax())
    if int(saved[last]) * 32 < padding_mask.numel() or int(saved[last]) * width < 2**15:
        return []
    shorter, longer = order[: last + 1], order[last + 1 :]
    parts = [(shorter, int(lengths[last])), (longer, int(lengths[-1]))]
    return [part for part in parts if len(part[0]) > 0]


class LRNDecoder(Decoder):
    """Embeddings and ``cfg.decoder_layers`` blocks of LRN, attention over the encoder and feed-forward.

    While it decodes word by word, it keeps keys and values of B sentences. For their N hypotheses it keeps
    one state (N, C) a layer, (N, 2·C) with LSTM.

    Args:
        cfg: an :class:`~fairseq_lrn.models.lrn.LRNConfig`
        dictionary: the target :class:`~fairseq.data.Dictionary`
        embed_tokens: ``nn.Embedding`` of width ``cfg.decoder_embed_dim``
    """

    __jit_ignored_attributes__ = ("translator",)

    def __init__(self, cfg, dictionary, embed_tokens):
        super().__init__(dictionary)
        embed_dim = cfg.decoder_embed_dim
        self.embed_tokens = embed_tokens
        self.padding_idx = embed_tokens.padding_idx
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(embed_dim)
        self.max_target_positions = cfg.max_target_positions
        self.dropout_module = build_embedding_dropout(cfg, self.__class__.__name__)
        self.layers = build_layers(LRNDecoderLayer, cfg, cfg.decoder_layers, cfg.decoder_layerdrop)
        self.num_layers = len(self.layers)
        self.alignment_layer = self.num_layers - 1 if cfg.alignment_layer is None else cfg.alignment_layer
        self.alignment_heads = cfg.alignment_heads or cfg.decoder_attention_heads
        self.learns_alignments = False  # whether training needs attention
        self.compiled = bool(cfg.compile)
        # These layers may run only once: DistributedDataParallel takes one gradient of what is checkpointed,
        # and quantization noise adds up.
        self.splits = not (cfg.checkpoint_activations or cfg.compile or cfg.quant_noise_pq > 0)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.translator: Any = None

        self.adaptive_softmax = None
        self.output_projection = None
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = build_adaptive_softmax(cfg, dictionary, embed_dim)
        else:
            self.output_projection = build_output_projection(
                embed_tokens, cfg.share_decoder_input_output_embed
            )

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
        return_all_hiddens: bool = False,
    ) -> Tuple[Tensor, Dict[str, List[Optional[Tensor]]]]:
        """As :meth:`forward`, but return features (B, T, C) instead of scores."""
        assert encoder_out is not None
        refuse_full_context(full_context_alignment)
        if not torch.jit.is_scripting():
            stepwise = incremental_state is not None and not return_all_hiddens
            native = prepared(self) if stepwise else None
            if native is not None:
                return self.translator.extract_features(
                    native,
                    prev_output_tokens,
                    encoder_out,
                    incremental_state,
                    alignment_layer,
                    alignment_heads,
                )
        encoder_x = encoder_out["encoder_out"][0]
        encoder_padding_mask: Optional[Tensor] = None
        if len(encoder_out["encoder_padding_mask"]) > 0:
            encoder_padding_mask = encoder_out["encoder_padding_mask"][0]
        need_attn = alignment_layer is not None or self.learns_alignments or not self.training
        if alignment_layer is None:
            alignment_layer = self.alignment_layer
        if alignment_heads is None:
            alignment_heads = self.alignment_heads

        states: Optional[Tensor] = None
        keys_values: Optional[Tensor] = None
        padding_mask: Optional[Tensor] = None
        if incremental_state is not None:
            prev_output_tokens = prev_output_tokens[:, -1:]
            saved = self.get_incremental_state(incremental_state, "states")
            if saved is not None:
                states, keys_values = saved["states"], saved["keys_values"]
        else:
            padding_mask = find_padding(prev_output_tokens, self.padding_idx, self.compiled)

        x = self.dropout_module(self.embed_scale * self.embed_tokens(prev_output_tokens.t()))
        if not torch.jit.is_scripting():
            whole = need_attn or return_all_hiddens or x.size(1) != encoder_x.size(1) or not self.splits
            if padding_mask is not None and not whole and x.device.type == "cpu" and eager():
                parts = split_by_length(padding_mask, x.size(2))
                if parts:
                    x = self._decode_parts(parts, prev_output_tokens, x, encoder_x, encoder_padding_mask)
                    return x, {"attn": [None], "inner_states": []}

        attn: Optional[Tensor] = None
        inner_states: List[Optional[Tensor]] = [x]
        new_states: List[Tensor] = []
        new_keys_values: List[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, state, layer_keys_values, layer_attn = layer(
                x,
                encoder_x,
                encoder_padding_mask,
                states[i : i + 1] if states is not None else None,
                padding_mask,
                keys_values[i] if keys_values is not None else None,
                i == alignment_layer and need_attn,
            )
            if return_all_hiddens:
                inner_states.append(x)
            new_states.append(state)
            new_keys_values.append(layer_keys_values)
            if layer_attn is not None and i == alignment_layer:
                attn = layer_attn
        if incremental_state is not None:
            if keys_values is None:
                keys_values = torch.stack(new_keys_values)
            last: Dict[str, Optional[Tensor]] = {"states": torch.cat(new_states), "keys_values": keys_values}
            self.set_incremental_state(incremental_state, "states", last)
        if attn is not None:
            attn = attn[:alignment_heads].mean(dim=0)

        x = self.layer_norm(x).transpose(0, 1)
        if not return_all_hiddens:
            inner_states = torch.jit.annotate(List[Optional[Tensor]], [])
        return x, {"attn": [attn], "inner_states": inner_states}

    def _decode_parts(self, parts, tokens: Tensor, x: Tensor, encoder_x: Tensor, mask: Optional[Tensor]):
        features = []
        for sentences, steps in parts:
            padding_mask = find_padding(tokens[sentences, :steps], self.padding_idx)
            part = x[:steps].index_select(1, sentences)
            memory = encoder_x.index_select(1, sentences)
            memory_mask = None if mask is None else mask[sentences]
            for layer in self.layers:
                part = layer(part, memory, memory_mask, None, padding_mask, None, False)[0]
            part = self.layer_norm(part).transpose(0, 1)
            features.append(F.pad(part, (0, 0, 0, tokens.size(1) - steps)))
        order = torch.cat([sentences for sentences, _ in parts]).argsort()
        return torch.cat(features).index_select(0, order)

    def output_layer(self, features: Tensor) -> Tensor:
        """Map features (B, T, C) to scores (B, T, V). With adaptive softmax the criterion does this."""
        if self.output_projection is None:
            return features
        if not torch.jit.is_scripting():
            return project(self.output_projection, features)
        return self.output_projection(features)

    @torch.jit.export
    def reorder_incremental_state(
        self, incremental_state: Dict[str, Dict[str, Optional[Tensor]]], new_order: Tensor
    ) -> Optional[Dict[str, Dict[str, Optional[Tensor]]]]:
        """Follow the beam: pick the states of the hypotheses ``new_order`` (N'), and their sentences."""
        saved = self.get_incremental_state(incremental_state, "states")
        if saved is not None:
            states, keys_values = saved["states"], saved["keys_values"]
            assert states is not None and keys_values is not None
            saved["states"] = states.index_select(1, new_order)
            sentences = pick_sentences(new_order, states.size(1), keys_values.size(2))
            if sentences is not None:
                saved["keys_values"] = keys_values.index_select(2, sentences)
        return incremental_state

    def reorder_incremental_state_scripting(
        self, incremental_state: Dict[str, Dict[str, Optional[Tensor]]], new_order: Tensor
    ) -> None:
        """As :meth:`reorder_incremental_state`. fairseq's method would look for states in every module."""
        self.reorder_incremental_state(incremental_state, new_order)
