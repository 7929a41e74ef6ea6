"""The paper's translation model, with any recurrent unit: fairseq model ``deepnmt`` and its architectures."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model

from .base import NoTorchScript, architecture
from .deepnmt_decoder import DeepNMTDecoder
from .deepnmt_encoder import DeepNMTEncoder
from .encoder_decoder import EncoderDecoderConfig, EncoderDecoderModel


@dataclass
class DeepNMTConfig(EncoderDecoderConfig):
    """Options of the ``deepnmt`` model."""

    context_aware_encoder: bool = field(
        default=False,
        metadata={"help": "let the first encoder layer's backward direction read the forward one's states"},
    )
    attention: ChoiceEnum(["additive", "dot"]) = field(
        default="additive", metadata={"help": "how states and encoder outputs are compared"}
    )
    layer_norm: bool = field(default=False, metadata={"help": "normalise the sum after each layer"})


@register_model("deepnmt", dataclass=DeepNMTConfig)
class DeepNMTModel(NoTorchScript, EncoderDecoderModel):
    """The deep recurrent encoder and decoder of Zhang and Sennrich (ACL 2019), section 5.

    The decoder's first layer has the attention inside its recurrence and runs step by step. All other layers
    run whole sequences.
    """

    config, encoder_class, decoder_class = DeepNMTConfig, DeepNMTEncoder, DeepNMTDecoder


architecture(
    "deepnmt",
    "deepnmt_tiny",
    encoder_embed_dim=128,
    encoder_layers=4,
    decoder_embed_dim=128,
    decoder_layers=4,
)
architecture(
    "deepnmt",
    "deepnmt_wmt_en_de",
    encoder_embed_dim=1024,
    encoder_layers=6,
    decoder_embed_dim=1024,
    decoder_layers=6,
    context_aware_encoder=True,
    share_decoder_input_output_embed=True,
)
