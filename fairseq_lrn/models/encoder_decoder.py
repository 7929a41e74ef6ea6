"""Shared by the encoder-decoders of this package: options and checks, building, scoring."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.models import FairseqEncoderDecoderModel, FairseqIncrementalDecoder
from torch import Tensor

from .base import Activation, CellConfig, build_embedding, check_cell, check_positive


@dataclass
class EncoderDecoderConfig(CellConfig):
    """Options of every encoder-decoder. Names are those of fairseq's Transformer where it has the option."""

    cell_activation: Optional[Activation] = field(
        default=None,
        metadata={
            "help": "activation g of lrn and olrn (default: identity, as in the authors' translation models)"
        },
    )
    encoder_embed_path: Optional[str] = field(
        default=None, metadata={"help": "path to pre-trained encoder embedding"}
    )
    encoder_embed_dim: int = field(default=512, metadata={"help": "encoder embedding dimension"})
    encoder_layers: int = field(default=6, metadata={"help": "number of encoder layers"})
    decoder_embed_path: Optional[str] = field(
        default=None, metadata={"help": "path to pre-trained decoder embedding"}
    )
    decoder_embed_dim: int = field(default=512, metadata={"help": "decoder embedding dimension"})
    decoder_layers: int = field(default=6, metadata={"help": "number of decoder layers"})
    decoder_attention_heads: int = field(
        default=4, metadata={"help": "number of heads of the attention over the encoder"}
    )
    alignment_heads: Optional[int] = field(
        default=None,
        metadata={"help": "number of the heads whose mean aligns source and target (default: all)"},
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    share_all_embeddings: bool = field(
        default=False,
        metadata={
            "help": "share encoder, decoder and output embeddings (requires shared dictionary and embed dim)"
        },
    )
    max_source_positions: int = field(
        default=1024, metadata={"help": "maximum number of tokens in the source sequence"}
    )
    max_target_positions: int = field(
        default=1024, metadata={"help": "maximum number of tokens in the target sequence"}
    )

    @property
    def activation(self) -> str:
        """Activation of the recurrent unit: the one given, or else that of the paper's translation."""
        if self.cell_activation is not None:
            return str(self.cell_activation)
        return "identity" if self.cell in ("lrn", "olrn") else "tanh"


class Decoder(FairseqIncrementalDecoder):
    """Base of the decoders: ``forward``, with the arguments of fairseq's Transformer."""

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
    ) -> Tuple[Tensor, Dict[str, List[Optional[Tensor]]]]:
        """Predict each next token.

        Args:
            prev_output_tokens: (B, T) token ids; with ``incremental_state`` only the last one is read
            encoder_out: what the model's encoder returns
            incremental_state: keeps the states between calls that decode word by word
            features_only: return features (B, T, C) instead of scores
            full_context_alignment: must be False, since a recurrence reads no later words
            alignment_layer: layer whose attention is returned (default: ``--alignment-layer``, or the last
                one); no effect if only one layer attends
            alignment_heads: average over this many heads (default: ``--alignment-heads``, or all)
            src_lengths: not used; the encoder's mask shows the padding
            return_all_hiddens: return the first layer's input and each layer's output

        Returns:
            scores (B, T, V), and a dictionary. Its ``attn`` is [(B, T, S), averaged over heads], for ``lrn``
            [None] in training without alignments. Its ``inner_states`` is [(T, B, C)], [] unless asked for.

        Raises:
            ValueError: ``full_context_alignment`` is True
        """
        x, extra = self.extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
            return_all_hiddens,
        )
        if not features_only:
            x = self.output_layer(x)
        return x, extra

    def max_positions(self) -> int:
        """Maximum target length in tokens."""
        return self.max_target_positions


class EncoderDecoderModel(FairseqEncoderDecoderModel):
    """A model with the ``config``, ``encoder_class`` and ``decoder_class`` that its subclasses name."""

    def __init__(self, cfg: EncoderDecoderConfig, encoder, decoder):
        super().__init__(encoder, decoder)
        self.cfg = cfg

    @classmethod
    def build_model(cls, cfg, task):
        """Build a model from its configuration (or a namespace) for ``task``'s dictionaries.

        Raises:
            ValueError: sizes that are not positive, heads that do not divide the width, embeddings that
                cannot be shared
        """
        cfg = cls.config.from_namespace(cfg)
        cls.complete(cfg)
        _check(cfg, task)
        source = build_embedding(task.source_dictionary, cfg.encoder_embed_dim, cfg, "encoder_embed_path")
        if cfg.share_all_embeddings:
            cfg.share_decoder_input_output_embed = True
            target = source
        else:
            target = build_embedding(task.target_dictionary, cfg.decoder_embed_dim, cfg, "decoder_embed_path")
        return cls(
            cfg,
            cls.encoder_class(cfg, task.source_dictionary, source),
            cls.decoder_class(cfg, task.target_dictionary, target),
        )

    @classmethod
    def complete(cls, cfg) -> None:
        """Set the options that follow from others."""

    @classmethod
    def from_pretrained(cls, model_name_or_path, checkpoint_file="model.pt", data_name_or_path=".", **kwargs):
        """As fairseq's, but with the task ``lrn_translation``, unless another task is given."""
        from ..tasks.hub import from_pretrained

        return from_pretrained(cls, model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor],
        prev_output_tokens: Tensor,
        return_all_hiddens: bool = False,
        features_only: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
    ):
        """Score ``prev_output_tokens`` (B, T) given ``src_tokens`` (B, S): see :meth:`Decoder.forward`."""
        encoder_out = self.encoder(src_tokens, src_lengths)
        return self.decoder(
            prev_output_tokens,
            encoder_out,
            features_only=features_only,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
            return_all_hiddens=return_all_hiddens,
        )

    def extract_features(
        self, src_tokens: Tensor, src_lengths: Optional[Tensor], prev_output_tokens, **kwargs
    ):
        """As :meth:`forward`, but return features (B, T, C) instead of scores."""
        return self(src_tokens, src_lengths, prev_output_tokens, features_only=True, **kwargs)

    @torch.jit.export
    def get_normalized_probs(
        self,
        net_output: Tuple[Tensor, Optional[Dict[str, List[Optional[Tensor]]]]],
        log_probs: bool,
        sample: Optional[Dict[str, Tensor]] = None,
    ):
        """Get normalized probabilities (or log probs) from the network's output."""
        return self.get_normalized_probs_scriptable(net_output, log_probs, sample)


def _check(cfg: EncoderDecoderConfig, task: Any) -> None:
    """Raise ValueError, in one sentence, for options that do not fit each other."""
    check_positive(
        cfg,
        (
            "encoder_embed_dim",
            "encoder_ffn_embed_dim",
            "encoder_layers",
            "decoder_embed_dim",
            "decoder_ffn_embed_dim",
            "decoder_layers",
            "decoder_attention_heads",
        ),
    )
    check_cell(cfg)
    if cfg.decoder_embed_dim % cfg.decoder_attention_heads != 0:
        raise ValueError(
            f"--decoder-embed-dim is {cfg.decoder_embed_dim}, but must be a multiple of "
            f"--decoder-attention-heads, {cfg.decoder_attention_heads}"
        )
    if cfg.alignment_heads is not None and not 0 < cfg.alignment_heads <= cfg.decoder_attention_heads:
        raise ValueError(
            f"--alignment-heads is {cfg.alignment_heads}, but must be from 1 to --decoder-attention-heads, "
            f"{cfg.decoder_attention_heads}"
        )
    if cfg.share_all_embeddings:
        if task.source_dictionary != task.target_dictionary:
            raise ValueError("--share-all-embeddings requires a joined dictionary")
        if cfg.encoder_embed_dim != cfg.decoder_embed_dim:
            raise ValueError(
                f"--share-all-embeddings requires --encoder-embed-dim ({cfg.encoder_embed_dim}) to match "
                f"--decoder-embed-dim ({cfg.decoder_embed_dim})"
            )
        if cfg.decoder_embed_path and cfg.decoder_embed_path != cfg.encoder_embed_path:
            raise ValueError("--share-all-embeddings is not compatible with another --decoder-embed-path")
