"""What the encoder-decoders of this package share: options and their checks, building, scoring."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.models import FairseqEncoderDecoderModel
from torch import Tensor

from .base import Activation, CellConfig, build_embedding, check_cell, check_positive


@dataclass
class EncoderDecoderConfig(CellConfig):
    """Options of every encoder-decoder; what fairseq's Transformer has too is named as there."""

    cell_activation: Optional[Activation] = field(
        default=None,
        metadata={
            "help": "activation g of lrn and olrn (default: identity, as the paper's translation has it)"
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
        """Activation of the recurrent unit: the one given, or else what the paper's translation has."""
        if self.cell_activation is not None:
            return str(self.cell_activation)
        return "identity" if self.cell in ("lrn", "olrn") else "tanh"


class EncoderDecoderModel(FairseqEncoderDecoderModel):
    """A model of ``config``, ``encoder_class`` and ``decoder_class``, which its subclasses name."""

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
        source = build_embedding(task.source_dictionary, cfg.encoder_embed_dim, cfg.encoder_embed_path)
        if cfg.share_all_embeddings:
            cfg.share_decoder_input_output_embed = True
            target = source
        else:
            target = build_embedding(task.target_dictionary, cfg.decoder_embed_dim, cfg.decoder_embed_path)
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
        """As fairseq's; the interface translates with the task ``lrn_translation`` unless one is given."""
        from ..tasks.hub import from_pretrained

        return from_pretrained(cls, model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor],
        prev_output_tokens: Tensor,
        features_only: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
    ):
        """Score ``prev_output_tokens`` (B, T) given ``src_tokens`` (B, S): see the decoder's ``forward``."""
        encoder_out = self.encoder(src_tokens, src_lengths)
        return self.decoder(
            prev_output_tokens,
            encoder_out,
            features_only=features_only,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
        )

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
    """Raise ValueError, in one sentence, for what cannot be built."""
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
