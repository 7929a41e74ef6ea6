"""The blocks of the ``lrn`` encoder and decoder: pre-norm residual recurrence, attention, feed-forward."""

from typing import Callable, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import Linear
from fairseq.modules import FairseqDropout, LayerDropModuleList
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor

from ..modules import build_recurrent
from ..modules.linear import is_plain, project
from ..ops.attention import attention, by_head, by_step
from .base import Dropout


def build_layers(layer: Callable[..., nn.Module], cfg, number: int, layerdrop: float) -> nn.ModuleList:
    """Return ``number`` blocks ``layer(cfg)``; training drops each with probability ``layerdrop``."""
    layers = LayerDropModuleList(p=layerdrop) if layerdrop > 0 else nn.ModuleList()
    min_params_to_wrap = cfg.min_params_to_wrap
    for _ in range(number):
        block = layer(cfg)
        if cfg.compile:
            block.compile(dynamic=True)  # in place: the names of its parameters stay
        if cfg.checkpoint_activations:
            block = checkpoint_wrapper(block, offload_to_cpu=cfg.offload_activations)
            min_params_to_wrap = 0
        layers.append(fsdp_wrap(block, min_num_params=min_params_to_wrap))
    return layers


class WordDropout(FairseqDropout):
    """Dropout of full words: it drops all C elements of a position (Sennrich et al., WMT 2016)."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Return ``x`` (T, B, C) with words dropped while training, or with ``--retain-dropout``."""
        if self.p > 0 and (self.training or self.apply_during_inference):
            return F.dropout1d(x, self.p)
        return x


def build_embedding_dropout(cfg, name: str) -> nn.Module:
    """Return the dropout of module ``name``'s embeddings (T, B, C): of words or of elements."""
    return WordDropout(cfg.word_dropout, name) if cfg.word_dropout > 0 else Dropout(cfg.dropout, name)


def build_linear(in_features: int, out_features: int, cfg) -> nn.Module:
    """Return fairseq's ``Linear``, with quantization noise on its weights if ``cfg`` asks for it."""
    return quant_noise(Linear(in_features, out_features), cfg.quant_noise_pq, cfg.quant_noise_pq_block_size)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, on (T, B, C)."""

    def __init__(self, embed_dim: int, ffn_embed_dim: int, cfg):
        super().__init__()
        self.fc1 = build_linear(embed_dim, ffn_embed_dim, cfg)
        self.fc2 = build_linear(ffn_embed_dim, embed_dim, cfg)
        self.activation_fn = utils.get_activation_fn(cfg.activation_fn)
        self.activation_dropout_module = Dropout(cfg.activation_dropout, self.__class__.__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, C) to (T, B, C), each position by itself."""
        x = self.fc1(x) if torch.jit.is_scripting() else project(self.fc1, x)
        x = self.activation_dropout_module(self.activation_fn(x))
        return self.fc2(x) if torch.jit.is_scripting() else project(self.fc2, x)


class EncoderAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) of target positions over the encoder's output.

    The parameters are those of fairseq's ``MultiheadAttention``. Keys and values are computed once for each
    sentence. All its hypotheses use them together.
    """

    def __init__(self, cfg):
        super().__init__()
        embed_dim, memory_dim = cfg.decoder_embed_dim, cfg.encoder_embed_dim
        self.head_dim = embed_dim // cfg.decoder_attention_heads
        self.k_proj = build_linear(memory_dim, embed_dim, cfg)
        self.v_proj = build_linear(memory_dim, embed_dim, cfg)
        self.q_proj = build_linear(embed_dim, embed_dim, cfg)
        self.out_proj = build_linear(embed_dim, embed_dim, cfg)
        self.dropout_module = Dropout(cfg.attention_dropout, self.__class__.__name__)
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5 if memory_dim == embed_dim else 1.0)

    def project(self, memory: Tensor) -> Tensor:
        """Return the keys and values, (2, B, heads, S, head_dim), of the encoder's output (S, B, C)."""
        if torch.jit.is_scripting():
            keys, values = self.k_proj(memory), self.v_proj(memory)
        else:
            keys, values = project(self.k_proj, memory), project(self.v_proj, memory)
        keys = keys.unflatten(2, (-1, self.head_dim)).permute(1, 2, 0, 3)
        values = values.unflatten(2, (-1, self.head_dim)).permute(1, 2, 0, 3)
        return torch.stack([keys, values]).contiguous()

    def forward(
        self, x: Tensor, keys_values: Tensor, padding_mask: Optional[Tensor], need_weights: bool
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attend from each target position.

        Args:
            x: (T, N, C). N is B or a multiple of it; the hypotheses of a sentence are next to each other.
            keys_values: of B sentences, from :meth:`project`
            padding_mask: (B, S), True at padding
            need_weights: return the weights

        Returns:
            context (T, N, C), and weights (heads, N, T, S) or None
        """
        query = self.q_proj(x) if torch.jit.is_scripting() else project(self.q_proj, x)
        active = self.dropout_module.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if active else 0.0
        # On the CPU PyTorch's own, which has dropout, is slower in bfloat16.
        fused = dropout == 0 or query.dtype != torch.bfloat16 or query.device.type != "cpu"
        if not torch.jit.is_scripting():
            fused = fused and is_plain(self.dropout_module, Dropout)
        weights: Optional[Tensor] = None
        if fused and not need_weights:
            y = attention(query, keys_values, padding_mask, dropout)
        else:
            scores = torch.matmul(
                by_head(query, keys_values) * self.head_dim**-0.5, keys_values[0].transpose(2, 3)
            )
            if padding_mask is not None:
                scores = scores.masked_fill(padding_mask[:, None, None], float("-inf"))
            weights = scores.softmax(3)
            y = by_step(torch.matmul(self.dropout_module(weights), keys_values[1]), x)
            weights = weights.unflatten(2, (-1, x.size(0))).transpose(1, 2).flatten(0, 1).transpose(0, 1)
        y = self.out_proj(y) if torch.jit.is_scripting() else project(self.out_proj, y)
        return y, weights if need_weights else None


class LRNEncoderLayer(nn.Module):
    """A bidirectional recurrence and a feed-forward block, each x + dropout(f(norm(x)))."""

    def __init__(self, cfg):
        super().__init__()
        embed_dim = cfg.encoder_embed_dim
        self.dropout_module = Dropout(cfg.dropout, self.__class__.__name__)
        self.rnn_layer_norm = nn.LayerNorm(embed_dim)
        self.rnn = build_recurrent(
            str(cfg.cell), embed_dim, embed_dim, bidirectional=True, activation=cfg.activation
        )
        self.out_proj = build_linear(2 * embed_dim, embed_dim, cfg)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, cfg.encoder_ffn_embed_dim, cfg)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Map (T, B, C) to (T, B, C); padding_mask (B, T) is True at padding."""
        y, _ = self.rnn(self.rnn_layer_norm(x), None, padding_mask)
        y = self.out_proj(y) if torch.jit.is_scripting() else project(self.out_proj, y)
        x = x + self.dropout_module(y)
        return x + self.dropout_module(self.ffn(self.final_layer_norm(x)))


class LRNDecoderLayer(nn.Module):
    """A recurrence, attention over the encoder and a feed-forward block, each x + dropout(f(norm(x)))."""

    def __init__(self, cfg):
        super().__init__()
        embed_dim = cfg.decoder_embed_dim
        self.dropout_module = Dropout(cfg.dropout, self.__class__.__name__)
        self.rnn_layer_norm = nn.LayerNorm(embed_dim)
        self.rnn = build_recurrent(str(cfg.cell), embed_dim, embed_dim, activation=cfg.activation)
        self.out_proj = build_linear(embed_dim, embed_dim, cfg)
        self.encoder_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.encoder_attn = EncoderAttention(cfg)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, cfg.decoder_ffn_embed_dim, cfg)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor,
        encoder_padding_mask: Optional[Tensor],
        state: Optional[Tensor],
        padding_mask: Optional[Tensor],
        keys_values: Optional[Tensor],
        need_attn: bool,
    ) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        """Run one block.

        Args:
            x: (T, N, C). N is B or a multiple of it; the hypotheses of a sentence are next to each other.
            encoder_out: (S, B, C_encoder)
            encoder_padding_mask: (B, S), True at padding
            state: of the recurrence before the first step, (1, N, C), LSTM's (1, N, 2·C), zeros if None
            padding_mask: (N, T), True at padding
            keys_values: those that an earlier call made of ``encoder_out``
            need_attn: return the attention weights

        Returns:
            output (T, N, C), state after the last step, keys and values, and attention weights
            (heads, N, T, S) or None
        """
        y, state = self.rnn(self.rnn_layer_norm(x), state, padding_mask)
        y = self.out_proj(y) if torch.jit.is_scripting() else project(self.out_proj, y)
        x = x + self.dropout_module(y)
        if keys_values is None:
            keys_values = self.encoder_attn.project(encoder_out)
        y, attn = self.encoder_attn(
            self.encoder_attn_layer_norm(x), keys_values, encoder_padding_mask, need_attn
        )
        x = x + self.dropout_module(y)
        x = x + self.dropout_module(self.ffn(self.final_layer_norm(x)))
        return x, state, keys_values, attn
