"""The LRN encoder-decoder: fairseq model ``lrn`` and its architectures."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP
from omegaconf import DictConfig, OmegaConf

from .base import AdaptiveSoftmaxConfig, architecture
from .encoder_decoder import EncoderDecoderConfig, EncoderDecoderModel
from .lrn_decoder import LRNDecoder
from .lrn_encoder import LRNEncoder


@dataclass
class LRNConfig(EncoderDecoderConfig, AdaptiveSoftmaxConfig):
    """Options of the ``lrn`` model. Names are those of fairseq's Transformer where it has the option."""

    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(
        default="relu", metadata={"help": "activation function of the feed-forward layers"}
    )
    alignment_layer: Optional[int] = field(
        default=None,
        metadata={
            "help": "decoder layer, from 0, whose attention aligns source and target (default: the last)"
        },
    )
    word_dropout: float = field(
        default=0.0,
        metadata={"help": "probability of dropping a whole embedding; replaces dropout of its elements"},
    )
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability for attention weights"}
    )
    activation_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability after activation in FFN"}
    )
    encoder_ffn_embed_dim: int = field(default=1024, metadata={"help": "encoder embedding dimension for FFN"})
    decoder_ffn_embed_dim: int = field(default=1024, metadata={"help": "decoder embedding dimension for FFN"})
    no_scale_embedding: bool = field(default=False, metadata={"help": "if True, dont scale embeddings"})
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
    compile: bool = field(
        default=False,
        metadata={"help": "compile each layer with torch.compile for training; checkpoints stay the same"},
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
        metadata={"help": "iterative PQ quantization noise at training time, on the layers' linear weights"},
    )
    quant_noise_pq_block_size: int = field(
        default=8, metadata={"help": "block size of quantization noise at training time"}
    )

    @classmethod
    def from_namespace(cls, args: Any) -> "LRNConfig":
        """As :meth:`CellConfig.from_namespace`, and remove ``compile`` from ``args``, which fairseq saves."""
        config = super().from_namespace(args)
        if config is not args and config.compile:
            whole = OmegaConf.select(args._get_root(), "model") if isinstance(args, DictConfig) else None
            (args if whole is None else whole).compile = False
        return config


@register_model("lrn", dataclass=LRNConfig)
class LRNModel(EncoderDecoderModel):
    """Translate with Lightweight Recurrent Networks and attention.

    An encoder block is a bidirectional LRN and a feed-forward layer. A decoder block is an LRN, attention
    over the encoder and a feed-forward layer. All have pre-norm residuals. No recurrence waits for attention,
    so training runs whole sequences through the operator.
    """

    config, encoder_class, decoder_class = LRNConfig, LRNEncoder, LRNDecoder
    __jit_ignored_attributes__ = ("translator",)

    def __init__(self, cfg: LRNConfig, encoder: LRNEncoder, decoder: LRNDecoder) -> None:
        super().__init__(cfg, encoder, decoder)
        self.translator = None  # see fairseq_lrn.inference

    @classmethod
    def build_model(cls, cfg, task):
        """As :meth:`EncoderDecoderModel.build_model`; attention is trained if ``task`` loads alignments.

        Raises:
            ValueError: also if the alignment layer does not exist, or if LayerDrop may drop it
        """
        model = super().build_model(cfg, task)
        layer, layers = model.decoder.alignment_layer, model.cfg.decoder_layers
        if not 0 <= layer < layers:
            raise ValueError(f"--alignment-layer is {layer}, but must be from 0 to {layers - 1}")
        model.decoder.learns_alignments = bool(getattr(getattr(task, "cfg", None), "load_alignments", False))
        if model.decoder.learns_alignments and model.cfg.decoder_layerdrop > 0:
            raise ValueError(
                f"--decoder-layerdrop is {model.cfg.decoder_layerdrop}, but must be 0 with --load-alignments"
            )
        return model

    @classmethod
    def complete(cls, cfg: LRNConfig) -> None:
        """Count the layers that are kept; offloading activations implies checkpointing them."""
        for side in ("encoder", "decoder"):
            kept = getattr(cfg, f"{side}_layers_to_keep")
            if kept:
                setattr(cfg, f"{side}_layers", len(kept.split(",")))
        if cfg.offload_activations:
            cfg.checkpoint_activations = True
        if cfg.compile and cfg.checkpoint_activations:
            raise ValueError("--compile is given, but must not be with --checkpoint-activations")
        if cfg.compile and cfg.cell not in ("lrn", "olrn"):
            raise ValueError(f"--compile is for lrn and olrn, but --cell is {cfg.cell}")

    def __prepare_scriptable__(self) -> "LRNModel":
        """Raise TypeError if the model has modules of fairseq that TorchScript cannot compile."""
        for option in ("offload_activations", "checkpoint_activations", "quant_noise_pq"):
            if getattr(self.cfg, option):
                raise TypeError(
                    f"TorchScript cannot compile fairseq's {option}: load the model with {option}=0"
                )
        if self.cfg.adaptive_softmax_cutoff is not None:
            raise TypeError("TorchScript cannot compile fairseq's adaptive softmax: use torch.compile")
        return self

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As :meth:`BaseFairseqModel.load_state_dict`, and write the number of kept layers to ``model_cfg``.

        So the checkpoint of a pruned and then trained model has the right configuration.
        """
        result = super().load_state_dict(state_dict, strict, model_cfg, args)
        self._refresh()
        if model_cfg is not None:
            model_cfg.encoder_layers = self.cfg.encoder_layers
            model_cfg.decoder_layers = self.cfg.decoder_layers
        return result

    def train(self, mode: bool = True) -> "LRNModel":
        """As :meth:`nn.Module.train`. A translator then packs the weights again.

        While the model trains, no memory is kept for translating on a GPU.
        """
        self._refresh()
        if mode and self.translator is not None:
            self.translator.graphs.clear()
        return super().train(mode)

    def make_generation_fast_(self, **kwargs) -> None:
        """fairseq calls this before it translates: from now on a translator runs the parts that it knows."""
        from ..inference import Translator

        super().make_generation_fast_(**kwargs)
        translator = Translator.of(self)
        if translator.native() is not None:
            self.encoder.translator = self.decoder.translator = translator

    def _refresh(self) -> None:
        if self.translator is not None:
            self.translator.refresh()


_TINY = {
    "encoder_embed_dim": 128,
    "encoder_ffn_embed_dim": 192,
    "encoder_layers": 4,
    "decoder_embed_dim": 128,
    "decoder_ffn_embed_dim": 256,
    "decoder_layers": 4,
    "word_dropout": 0.1,
}
_WMT = {"encoder_ffn_embed_dim": 2048, "decoder_ffn_embed_dim": 2048, "decoder_attention_heads": 8}

architecture("lrn", "lrn_tiny", **_TINY)
architecture("lrn", "lrn_iwslt_de_en")
architecture("lrn", "lrn_wmt_en_de", **_WMT)
architecture("lrn", "olrn_iwslt_de_en", cell="olrn")
architecture("lrn", "olrn_wmt_en_de", cell="olrn", **_WMT)
