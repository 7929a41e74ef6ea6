"""The decoder of the ``deepnmt`` model."""

from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.models.transformer import Linear
from torch import Tensor

from ..modules import StepAttention, build_cell, build_recurrent
from ..modules.linear import project
from .base import Dropout, build_output_projection, find_padding, pick_sentences, refuse_full_context
from .encoder_decoder import Decoder


class DeepNMTDecoder(Decoder):
    """A conditional recurrent layer with attention between its two cells, and layers above it.

    The first cell reads the previous word. Its output attends to the encoder's output, and the second cell
    reads the context found there. Each upper layer reads the sum below it and the context. After each layer
    come a linear map, dropout, the residual sum and, if asked for, layer normalisation.

    Args:
        cfg: a :class:`~fairseq_lrn.models.deepnmt.DeepNMTConfig`
        dictionary: the target :class:`~fairseq.data.Dictionary`
        embed_tokens: ``nn.Embedding`` of width ``cfg.decoder_embed_dim``
    """

    def __init__(self, cfg, dictionary, embed_tokens):
        super().__init__(dictionary)
        size, memory, layers = cfg.decoder_embed_dim, cfg.encoder_embed_dim, cfg.decoder_layers
        cell, activation = str(cfg.cell), cfg.activation
        self.embed_tokens = embed_tokens
        self.embed_bias = nn.Parameter(torch.zeros(size))
        self.padding_idx = embed_tokens.padding_idx
        self.max_target_positions = cfg.max_target_positions
        self.alignment_heads = cfg.alignment_heads or cfg.decoder_attention_heads
        self.dropout_module = Dropout(cfg.dropout, self.__class__.__name__)
        self.first = build_cell(cell, size, size, activation)
        self.attention = StepAttention(size, memory, cfg.decoder_attention_heads, cfg.attention == "additive")
        self.second = build_cell(cell, memory, size, activation)
        self.rnns = nn.ModuleList(
            build_recurrent(cell, size + memory, size, activation=activation) for _ in range(layers - 1)
        )
        self.projections = nn.ModuleList(Linear(size, size) for _ in range(layers))
        self.layer_norms = nn.ModuleList(
            nn.LayerNorm(size) if cfg.layer_norm else nn.Identity() for _ in range(layers)
        )
        width = self.first.state_size
        self.initial_states = Linear(memory * width // size, layers * width)
        self.feature = Linear(size + memory, size)
        self.output_projection = build_output_projection(embed_tokens, cfg.share_decoder_input_output_embed)

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
        refuse_full_context(full_context_alignment)
        assert encoder_out is not None
        memory = encoder_out["encoder_out"][0]
        memory_mask = next(iter(encoder_out["encoder_padding_mask"]), None)
        saved, padding_mask = None, None
        if incremental_state is None:
            padding_mask = find_padding(prev_output_tokens, self.padding_idx)
        else:
            prev_output_tokens = prev_output_tokens[:, -1:]
            saved = self.get_incremental_state(incremental_state, "saved")
        if saved is None:
            states = self.initial_states(encoder_out["encoder_state"][0][0])
            states = states.repeat_interleave(len(prev_output_tokens) // len(states), 0)
            states = states.unflatten(1, (len(self.projections), -1)).transpose(0, 1)
            keys, memory = self.attention.project(memory, memory_mask)
            saved = {"states": states, "keys": keys}
        states, keys = saved["states"], saved["keys"]

        x = self.dropout_module(self.embed_tokens(prev_output_tokens.t()) + self.embed_bias)
        inner_states = [x]
        state, outputs, contexts, weights = states[0], [], [], []
        for t, projected in enumerate(self.first.project(x).unbind(0)):
            query, new = self.first.step(projected, state)
            context, weight = self.attention(query, keys, memory, memory_mask)
            output, new = self.second.step(self.second.project(context), new)
            state = new if padding_mask is None else state.where(padding_mask[:, t : t + 1], new)
            outputs.append(output)
            contexts.append(context)
            weights.append(weight)
        y, context = torch.stack(outputs), torch.stack(contexts)
        new_states = [state[None]]
        x = self.layer_norms[0](x + self.dropout_module(project(self.projections[0], y)))
        inner_states.append(x)
        for i, rnn in enumerate(self.rnns, 1):
            y, state = rnn(torch.cat([x, context], 2), states[i : i + 1].contiguous(), padding_mask)
            x = self.layer_norms[i](x + self.dropout_module(project(self.projections[i], y)))
            inner_states.append(x)
            new_states.append(state)
        if incremental_state is not None:
            saved = {"states": torch.cat(new_states), "keys": keys}
            self.set_incremental_state(incremental_state, "saved", saved)

        x = torch.tanh(project(self.feature, torch.cat([x, context], 2)))
        x = self.dropout_module(x).transpose(0, 1)
        heads = self.alignment_heads if alignment_heads is None else alignment_heads
        attn = torch.stack(weights, 1)[:, :, :heads].mean(2)
        return x, {"attn": [attn], "inner_states": inner_states if return_all_hiddens else []}

    def output_layer(self, features: Tensor) -> Tensor:
        """Map features (B, T, C) to scores (B, T, V)."""
        return project(self.output_projection, features)

    def reorder_incremental_state(
        self, incremental_state: Dict[str, Dict[str, Optional[Tensor]]], new_order: Tensor
    ) -> None:
        """Follow the beam: pick the states of the hypotheses ``new_order`` (N'), and their sentences."""
        saved = self.get_incremental_state(incremental_state, "saved")
        if saved is not None:
            states, keys = saved["states"], saved["keys"]
            sentences = pick_sentences(new_order, states.size(1), keys.size(1))
            keys = keys if sentences is None else keys.index_select(1, sentences)
            saved = {"states": states.index_select(1, new_order), "keys": keys}
            self.set_incremental_state(incremental_state, "saved", saved)
