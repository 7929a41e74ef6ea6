"""The blocks of the ``lrn`` encoder and decoder: pre-norm residual recurrence, attention, feed-forward."""

from typing import Callable, Dict, Optional, Tuple

import torch.nn as nn
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import Linear
from fairseq.modules import FairseqDropout, LayerDropModuleList, MultiheadAttention
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor

from ..modules import build_recurrent


def build_layers(layer: Callable[..., nn.Module], cfg, number: int, layerdrop: float) -> nn.ModuleList:
    """Return ``number`` blocks ``layer(cfg)``; training leaves out each with probability ``layerdrop``."""
    layers = LayerDropModuleList(p=layerdrop) if layerdrop > 0 else nn.ModuleList()
    min_params_to_wrap = cfg.min_params_to_wrap
    for _ in range(number):
        block = layer(cfg)
        if cfg.checkpoint_activations:
            block = checkpoint_wrapper(block, offload_to_cpu=cfg.offload_activations)
            min_params_to_wrap = 0
        layers.append(fsdp_wrap(block, min_num_params=min_params_to_wrap))
    return layers


def build_linear(in_features: int, out_features: int, cfg) -> nn.Module:
    """Return fairseq's ``Linear``, with quantization noise on its weights where ``cfg`` asks for it."""
    return quant_noise(Linear(in_features, out_features), cfg.quant_noise_pq, cfg.quant_noise_pq_block_size)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, on (T, B, C)."""

    def __init__(self, embed_dim: int, ffn_embed_dim: int, cfg):
        super().__init__()
        self.fc1 = build_linear(embed_dim, ffn_embed_dim, cfg)
        self.fc2 = build_linear(ffn_embed_dim, embed_dim, cfg)
        self.activation_fn = utils.get_activation_fn(cfg.activation_fn)
        self.activation_dropout_module = FairseqDropout(cfg.activation_dropout, self.__class__.__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, C) to (T, B, C), each position by itself."""
        return self.fc2(self.activation_dropout_module(self.activation_fn(self.fc1(x))))


class LRNEncoderLayer(nn.Module):
    """A bidirectional recurrence and a feed-forward block, each x + dropout(f(norm(x)))."""

    def __init__(self, cfg):
        super().__init__()
        embed_dim = cfg.encoder_embed_dim
        self.dropout_module = FairseqDropout(cfg.dropout, self.__class__.__name__)
        self.rnn_layer_norm = nn.LayerNorm(embed_dim)
        self.rnn = build_recurrent(
            str(cfg.cell), embed_dim, embed_dim, bidirectional=True, activation=str(cfg.cell_activation)
        )
        self.out_proj = build_linear(2 * embed_dim, embed_dim, cfg)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, cfg.encoder_ffn_embed_dim, cfg)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Map (T, B, C) to (T, B, C); padding_mask (B, T) is True at padding."""
        y, _ = self.rnn(self.rnn_layer_norm(x), None, padding_mask)
        x = x + self.dropout_module(self.out_proj(y))
        return x + self.dropout_module(self.ffn(self.final_layer_norm(x)))


class LRNDecoderLayer(nn.Module):
    """A recurrence, attention over the encoder and a feed-forward block, each x + dropout(f(norm(x)))."""

    def __init__(self, cfg):
        super().__init__()
        embed_dim = cfg.decoder_embed_dim
        self.dropout_module = FairseqDropout(cfg.dropout, self.__class__.__name__)
        self.rnn_layer_norm = nn.LayerNorm(embed_dim)
        self.rnn = build_recurrent(str(cfg.cell), embed_dim, embed_dim, activation=str(cfg.cell_activation))
        self.out_proj = build_linear(embed_dim, embed_dim, cfg)
        self.encoder_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.encoder_attn = MultiheadAttention(
            embed_dim,
            cfg.decoder_attention_heads,
            kdim=cfg.encoder_embed_dim,
            vdim=cfg.encoder_embed_dim,
            dropout=cfg.attention_dropout,
            encoder_decoder_attention=True,
            q_noise=cfg.quant_noise_pq,
            qn_block_size=cfg.quant_noise_pq_block_size,
        )
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, cfg.decoder_ffn_embed_dim, cfg)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor,
        encoder_padding_mask: Optional[Tensor],
        state: Optional[Tensor],
        padding_mask: Optional[Tensor],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
        need_attn: bool,
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Run one block.

        Args:
            x: (T, B, C)
            encoder_out: (S, B, C_encoder)
            encoder_padding_mask: (B, S), True at padding
            state: the recurrence's before the first step, (1, B, C), LSTM's (1, B, 2·C), zeros if None
            padding_mask: (B, T), True at padding
            incremental_state: where attention keeps the encoder's keys and values while decoding
            need_attn: return the attention weights

        Returns:
            output (T, B, C), state after the last step, attention weights (heads, B, T, S) or None
        """
        y, state = self.rnn(self.rnn_layer_norm(x), state, padding_mask)
        x = x + self.dropout_module(self.out_proj(y))
        y, attn = self.encoder_attn(
            query=self.encoder_attn_layer_norm(x),
            key=encoder_out,
            value=encoder_out,
            key_padding_mask=encoder_padding_mask,
            incremental_state=incremental_state,
            # without it fairseq takes a faster way, which cannot tell the heads apart
            static_kv=incremental_state is not None or need_attn,
            need_weights=need_attn,
            need_head_weights=need_attn,
        )
        x = x + self.dropout_module(y)
        x = x + self.dropout_module(self.ffn(self.final_layer_norm(x)))
        return x, state, attn
