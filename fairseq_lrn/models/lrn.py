"""The LRN encoder-decoder: fairseq model ``lrn`` and its architectures."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import FairseqEncoderDecoderModel, register_model, register_model_architecture
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP, Embedding
from torch import Tensor

from ..modules import CELLS
from .lrn_decoder import LRNDecoder
from .lrn_encoder import LRNEncoder


@dataclass
class LRNConfig(FairseqDataclass):
    """Options of the ``lrn`` model; where fairseq's Transformer has the same option, the name is the same."""

    cell: ChoiceEnum(CELLS) = field(
        default="lrn", metadata={"help": "recurrent unit; olrn is lrn with an output gate"}
    )
    cell_activation: ChoiceEnum(["tanh", "identity"]) = field(
        default="tanh", metadata={"help": "activation g of lrn and olrn"}
    )
    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(
        default="relu", metadata={"help": "activation function of the feed-forward layers"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability for attention weights"}
    )
    activation_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability after activation in FFN"}
    )
    encoder_embed_path: Optional[str] = field(
        default=None, metadata={"help": "path to pre-trained encoder embedding"}
    )
    encoder_embed_dim: int = field(default=512, metadata={"help": "encoder embedding dimension"})
    encoder_ffn_embed_dim: int = field(default=1024, metadata={"help": "encoder embedding dimension for FFN"})
    encoder_layers: int = field(default=6, metadata={"help": "number of encoder layers"})
    decoder_embed_path: Optional[str] = field(
        default=None, metadata={"help": "path to pre-trained decoder embedding"}
    )
    decoder_embed_dim: int = field(default=512, metadata={"help": "decoder embedding dimension"})
    decoder_ffn_embed_dim: int = field(default=1024, metadata={"help": "decoder embedding dimension for FFN"})
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
    no_scale_embedding: bool = field(default=False, metadata={"help": "if True, dont scale embeddings"})
    adaptive_softmax_cutoff: Optional[List[int]] = field(
        default=None,
        metadata={
            "help": "list of adaptive softmax cutoff points. Must be used with adaptive_loss criterion"
        },
    )
    adaptive_softmax_dropout: float = field(
        default=0.0, metadata={"help": "sets adaptive softmax dropout for the tail projections"}
    )
    adaptive_softmax_factor: float = field(default=4, metadata={"help": "adaptive input factor"})
    encoder_layerdrop: float = field(default=0.0, metadata={"help": "LayerDrop probability for encoder"})
    encoder_layers_to_keep: Optional[str] = field(
        default=None,
        metadata={"help": "which encoder layers to *keep* when pruning, as a comma-separated list"},
    )
    decoder_layerdrop: float = field(default=0.0, metadata={"help": "LayerDrop probability for decoder"})
    decoder_layers_to_keep: Optional[str] = field(
        default=None,
        metadata={"help": "which decoder layers to *keep* when pruning, as a comma-separated list"},
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={"help": "checkpoint activations at each layer: less memory for more computation"},
    )
    offload_activations: bool = field(
        default=False,
        metadata={
            "help": "checkpoint activations and keep them in CPU memory (sets --checkpoint-activations)"
        },
    )
    min_params_to_wrap: int = field(
        default=DEFAULT_MIN_PARAMS_TO_WRAP,
        metadata={
            "help": "minimum number of params for a layer to be wrapped with FSDP() when training with "
            "--ddp-backend=fully_sharded (0 with --checkpoint-activations)"
        },
    )
    quant_noise_pq: float = field(
        default=0.0,
        metadata={"help": "iterative PQ quantization noise at training time, on all but recurrent weights"},
    )
    quant_noise_pq_block_size: int = field(
        default=8, metadata={"help": "block size of quantization noise at training time"}
    )
    max_source_positions: int = field(
        default=1024, metadata={"help": "maximum number of tokens in the source sequence"}
    )
    max_target_positions: int = field(
        default=1024, metadata={"help": "maximum number of tokens in the target sequence"}
    )


@register_model("lrn", dataclass=LRNConfig)
class LRNModel(FairseqEncoderDecoderModel):
    """Translate with Lightweight Recurrent Networks and attention.

    Encoder blocks are a bidirectional LRN and a feed-forward layer, decoder blocks an LRN, attention over the
    encoder and a feed-forward layer, all with pre-norm residuals. No recurrence waits for attention, so that
    training runs whole sequences through the operator.
    """

    def __init__(self, cfg: LRNConfig, encoder: LRNEncoder, decoder: LRNDecoder):
        super().__init__(encoder, decoder)
        self.cfg = cfg

    @classmethod
    def build_model(cls, cfg, task) -> "LRNModel":
        """Build a model from an :class:`LRNConfig` (or namespace) for ``task``'s dictionaries.

        Raises:
            ValueError: sizes that are not positive, heads that do not divide the width, embeddings that
                cannot be shared
        """
        cfg = LRNConfig.from_namespace(cfg)
        for side in ("encoder", "decoder"):
            kept = getattr(cfg, f"{side}_layers_to_keep")
            if kept:
                setattr(cfg, f"{side}_layers", len(kept.split(",")))
        if cfg.offload_activations:
            cfg.checkpoint_activations = True
        _check(cfg, task)
        source = cls.build_embedding(task.source_dictionary, cfg.encoder_embed_dim, cfg.encoder_embed_path)
        if cfg.share_all_embeddings:
            cfg.share_decoder_input_output_embed = True
            target = source
        else:
            target = cls.build_embedding(
                task.target_dictionary, cfg.decoder_embed_dim, cfg.decoder_embed_path
            )
        return cls(
            cfg,
            LRNEncoder(cfg, task.source_dictionary, source),
            LRNDecoder(cfg, task.target_dictionary, target),
        )

    @classmethod
    def build_embedding(cls, dictionary, embed_dim: int, path: Optional[str] = None):
        """Make an embedding, with the vectors of the text file ``path`` for the words found there."""
        embedding = Embedding(len(dictionary), embed_dim, dictionary.pad())
        if path:
            utils.load_embedding(utils.parse_embedding(path), dictionary, embedding)
        return embedding

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

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As :meth:`BaseFairseqModel.load_state_dict`, noting in ``model_cfg`` how many layers were kept.

        So a checkpoint of a model that was pruned and trained on says what it holds.
        """
        result = super().load_state_dict(state_dict, strict, model_cfg, args)
        if model_cfg is not None:
            model_cfg.encoder_layers = self.cfg.encoder_layers
            model_cfg.decoder_layers = self.cfg.decoder_layers
        return result

    @torch.jit.export
    def get_normalized_probs(
        self,
        net_output: Tuple[Tensor, Optional[Dict[str, List[Optional[Tensor]]]]],
        log_probs: bool,
        sample: Optional[Dict[str, Tensor]] = None,
    ):
        """Get normalized probabilities (or log probs) from the network's output."""
        return self.get_normalized_probs_scriptable(net_output, log_probs, sample)


def _check(cfg: LRNConfig, task: Any) -> None:
    """Raise ValueError, in one sentence, for what cannot be built."""
    for name in (
        "encoder_embed_dim",
        "encoder_ffn_embed_dim",
        "encoder_layers",
        "decoder_embed_dim",
        "decoder_ffn_embed_dim",
        "decoder_layers",
        "decoder_attention_heads",
    ):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, but must be positive")
    if cfg.decoder_embed_dim % cfg.decoder_attention_heads != 0:
        raise ValueError(
            f"--decoder-embed-dim is {cfg.decoder_embed_dim}, but must be a multiple of "
            f"--decoder-attention-heads, {cfg.decoder_attention_heads}"
        )
    if cfg.cell not in ("lrn", "olrn") and cfg.cell_activation != "tanh":
        raise ValueError(
            f"--cell-activation {cfg.cell_activation} is for lrn and olrn, but --cell is {cfg.cell}"
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


def _architecture(name: str, **values: Any) -> None:
    """Register architecture ``name``: the defaults of :class:`LRNConfig`, but for ``values``."""

    @register_model_architecture("lrn", name)
    def apply(cfg: Any) -> None:
        for option, value in values.items():
            if not hasattr(cfg, option):
                setattr(cfg, option, value)


_TINY = {
    "encoder_embed_dim": 128,
    "encoder_ffn_embed_dim": 192,
    "encoder_layers": 4,
    "decoder_embed_dim": 128,
    "decoder_ffn_embed_dim": 256,
    "decoder_layers": 4,
}
_WMT = {"encoder_ffn_embed_dim": 2048, "decoder_ffn_embed_dim": 2048, "decoder_attention_heads": 8}

_architecture("lrn_tiny", **_TINY)
_architecture("lrn_iwslt_de_en")
_architecture("lrn_wmt_en_de", **_WMT)
_architecture("olrn_iwslt_de_en", cell="olrn")
_architecture("olrn_wmt_en_de", cell="olrn", **_WMT)
