"""The recurrent language model: fairseq model ``lrn_lm``."""

import math
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from torch import Tensor

from ..modules import LockedDropout, MixtureOfSoftmaxes, StackedRecurrent
from ..modules.linear import project
from .base import (
    AdaptiveSoftmaxConfig,
    CellConfig,
    NoTorchScript,
    build_adaptive_softmax,
    build_embedding,
    build_output_projection,
    check_cell,
    check_positive,
    find_padding,
    refuse_full_context,
)


@dataclass
class LRNLanguageModelConfig(CellConfig, AdaptiveSoftmaxConfig):
    """Options of ``lrn_lm``. Names are those of fairseq's ``lstm_lm`` and ``transformer_lm``."""

    decoder_embed_dim: int = field(default=512, metadata={"help": "decoder embedding dimension"})
    decoder_hidden_size: int = field(default=512, metadata={"help": "decoder hidden size"})
    decoder_layers: int = field(default=1, metadata={"help": "number of decoder layers"})
    embed_dropout: float = field(
        default=0.0, metadata={"help": "probability that a word's embedding is zero throughout a batch"}
    )
    decoder_dropout_in: Optional[float] = field(
        default=None,
        metadata={"help": "dropout probability for decoder input embedding (default: --dropout)"},
    )
    decoder_dropout_out: Optional[float] = field(
        default=None, metadata={"help": "dropout probability for decoder output (default: --dropout)"}
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    mixture_of_softmaxes: int = field(
        default=0,
        metadata={"help": "number of softmaxes in the mixture that predicts a word; 0: one softmax"},
    )


class LRNLanguageModelDecoder(FairseqIncrementalDecoder):
    """Embeddings, ``cfg.decoder_layers`` layers of a recurrent unit, and a softmax.

    Dropout is that of AWD-LSTM (Merity et al., ICLR 2018): of whole words, and locked at the input, between
    layers and at the output. If the unit is not as wide as the embeddings, a matrix projects its output to
    their width, unless a mixture of softmaxes does so.

    Args:
        cfg: an :class:`LRNLanguageModelConfig`
        dictionary: of the words to predict
        embed_tokens: ``nn.Embedding`` of the words to read, ``cfg.decoder_embed_dim`` wide
    """

    def __init__(
        self, cfg: LRNLanguageModelConfig, dictionary: Dictionary, embed_tokens: nn.Embedding
    ) -> None:
        super().__init__(dictionary)
        embed_dim, hidden_size = cfg.decoder_embed_dim, cfg.decoder_hidden_size
        self.embed_tokens = embed_tokens
        self.embed_scale = math.sqrt(embed_dim)
        self.embed_dropout = cfg.embed_dropout
        self.dropout_in, self.dropout_out = (
            LockedDropout(cfg.dropout if p is None else p)
            for p in (cfg.decoder_dropout_in, cfg.decoder_dropout_out)
        )
        self.rnn = StackedRecurrent(
            str(cfg.cell),
            embed_dim,
            hidden_size,
            cfg.decoder_layers,
            dropout=cfg.dropout,
            activation=str(cfg.cell_activation),
        )
        self.project_out_dim = None
        if hidden_size != embed_dim and not cfg.mixture_of_softmaxes:
            self.project_out_dim = nn.Linear(hidden_size, embed_dim, bias=False)

        self.adaptive_softmax = None
        self.output_projection = None
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = build_adaptive_softmax(cfg, dictionary, embed_dim)
        else:
            shared = cfg.share_decoder_input_output_embed
            self.output_projection = build_output_projection(
                embed_tokens if shared else build_embedding(dictionary, embed_dim), True
            )
            if cfg.mixture_of_softmaxes:
                self.output_projection = MixtureOfSoftmaxes(
                    hidden_size, cfg.mixture_of_softmaxes, self.output_projection
                )
        self.max_target_positions = int(super().max_positions())
        # in training and in evaluation: states (L, B, S) that the last block and the next begin with
        self.carried: Dict[bool, Dict[int, Optional[Tensor]]] = {True: {}, False: {}}

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        block: Optional[int] = None,
    ) -> Tuple[Tensor, Optional[Dict[str, List[Tensor]]]]:
        """Predict each next word.

        Args:
            prev_output_tokens: (B, T) word ids; with ``incremental_state`` only the last one is read
            encoder_out: not used
            incremental_state: keeps the states between calls that decode word by word
            features_only: return features (B, T, C) instead of scores
            full_context_alignment: must be False, since a recurrence reads no later words
            alignment_layer, alignment_heads: must be None, since there is nothing to attend to
            src_lengths: not used
            return_all_hiddens: return the first layer's input and each layer's output
            block: number, from 0, of the block of text in each row's stream. The block starts with the last
                states of the block before, detached, if that block or this one was the last that was read in
                the same mode, training or evaluation. Otherwise, and with None, it starts with zeros.

        Returns:
            scores (B, T, V), log-probabilities with a mixture of softmaxes, or features (B, T, C) with
            adaptive softmax; and None, or, if asked for, a dictionary with ``inner_states``: [(T, B, C)]

        Raises:
            ValueError: an argument that must be False or None has another value
        """
        x, extra = self.extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
            src_lengths,
            return_all_hiddens,
            block,
        )
        return x if features_only else self.output_layer(x), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        block: Optional[int] = None,
    ) -> Tuple[Tensor, Optional[Dict[str, List[Tensor]]]]:
        """As :meth:`forward`, but return features (B, T, C) instead of scores."""
        refuse_full_context(full_context_alignment)
        if alignment_layer is not None or alignment_heads is not None:
            raise ValueError(
                "alignment_layer and alignment_heads must be None: a language model attends to no source"
            )
        states: Optional[Tensor] = None
        padding_mask: Optional[Tensor] = None
        if incremental_state is not None:
            prev_output_tokens = prev_output_tokens[:, -1:]
            saved = self.get_incremental_state(incremental_state, "states")
            if saved is not None:
                states = saved["states"]
        else:
            padding_mask = find_padding(prev_output_tokens, self.embed_tokens.padding_idx)  # type: ignore[arg-type]
        if block is not None:
            states = self.carried[self.training].get(block)
            if states is not None:
                states = states[:, : prev_output_tokens.size(0)]

        tokens = prev_output_tokens.t()
        x = self.embed_scale * self.embed_tokens(tokens)
        if self.training and self.embed_dropout > 0:
            words = x.new_ones(self.embed_tokens.num_embeddings)
            x = x * nn.functional.dropout(words, self.embed_dropout)[tokens].unsqueeze(2)
        x = self.dropout_in(x)
        inner_states = [x] if return_all_hiddens else None
        x, last_states = self.rnn(
            x, None if states is None else list(states.split(1)), padding_mask, inner_states
        )
        x = self.dropout_out(x)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)

        if incremental_state is not None:
            self.set_incremental_state(incremental_state, "states", {"states": torch.cat(last_states)})
        if block is not None:
            self.carried[self.training] = {block: states, block + 1: torch.cat(last_states).detach()}
        return x.transpose(0, 1), None if inner_states is None else {"inner_states": inner_states}

    def output_layer(self, features: Tensor) -> Tensor:
        """Map features (B, T, C) to scores (B, T, V). With adaptive softmax the criterion does this."""
        return features if self.output_projection is None else project(self.output_projection, features)

    def max_positions(self) -> int:
        """Return the task's ``--max-target-positions``; without it, there is no limit."""
        return self.max_target_positions

    def reorder_incremental_state(
        self, incremental_state: Dict[str, Dict[str, Optional[Tensor]]], new_order: Tensor
    ) -> None:
        """Follow the beam: pick the states of the hypotheses ``new_order`` (B')."""
        saved = self.get_incremental_state(incremental_state, "states")
        if saved is not None:
            saved["states"] = saved["states"].index_select(1, new_order)


@register_model("lrn_lm", dataclass=LRNLanguageModelConfig)
class LRNLanguageModel(NoTorchScript, FairseqLanguageModel):
    """Predict each next word of a text with recurrent layers. The text may have any length."""

    @classmethod
    def build_model(cls, cfg, task):
        """Build a model from its configuration (or a namespace) for ``task``'s dictionaries.

        Raises:
            ValueError: sizes that are not positive, options that exclude each other, embeddings that cannot
                be shared
        """
        cfg = LRNLanguageModelConfig.from_namespace(cfg)
        _check(cfg, task)
        embed_tokens = build_embedding(task.source_dictionary, cfg.decoder_embed_dim)
        decoder = LRNLanguageModelDecoder(cfg, task.target_dictionary, embed_tokens)
        limit = getattr(getattr(task, "args", None), "max_target_positions", None)
        if limit is not None:
            decoder.max_target_positions = limit
        return cls(decoder)


def _check(cfg: LRNLanguageModelConfig, task) -> None:
    """Raise ValueError, in one sentence, for options that do not fit each other."""
    check_positive(cfg, ("decoder_embed_dim", "decoder_hidden_size", "decoder_layers"))
    check_cell(cfg)
    if cfg.mixture_of_softmaxes < 0:
        raise ValueError(f"--mixture-of-softmaxes is {cfg.mixture_of_softmaxes}, but must be 0 or positive")
    if cfg.adaptive_softmax_cutoff is not None:
        if cfg.mixture_of_softmaxes:
            raise ValueError("--mixture-of-softmaxes cannot be used with --adaptive-softmax-cutoff")
        if cfg.share_decoder_input_output_embed:
            raise ValueError(
                "--share-decoder-input-output-embed cannot be used with --adaptive-softmax-cutoff"
            )
    if cfg.share_decoder_input_output_embed and len(task.source_dictionary) != len(task.target_dictionary):
        raise ValueError(
            f"--share-decoder-input-output-embed needs one dictionary, but {len(task.source_dictionary)} "
            f"words are read and {len(task.target_dictionary)} predicted"
        )
