"""The measured models: untrained ones, and a Transformer in CTranslate2."""

import argparse
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import nn

import fairseq_lrn.models  # noqa: F401  registers them


def make_dictionary(size: int) -> Dictionary:
    """Return a dictionary of ``size`` words, including fairseq's symbols."""
    dictionary = Dictionary()
    for i in range(size - len(dictionary)):
        dictionary.add_symbol(str(i))
    return dictionary


def build(name: str, dictionary: Dictionary, **options: Any) -> nn.Module:
    """Return an untrained model of the architecture ``name`` for one dictionary of both sides."""
    cfg = argparse.Namespace(**options)
    ARCH_CONFIG_REGISTRY[name](cfg)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return ARCH_MODEL_REGISTRY[name].build_model(cfg, task)


def peer(model: nn.Module, dictionary: Dictionary, compute_type: str, **options: Any) -> Any:
    """Return CTranslate2's translator with the weights of ``model``, fairseq's Transformer, in float32.

    Raises:
        Exception: CTranslate2, or a library that it needs, is missing
    """
    import ctranslate2
    from ctranslate2.converters import fairseq as converter

    first = model.encoder.layers[0]
    layers = (len(model.encoder.layers), len(model.decoder.layers))
    spec = ctranslate2.specs.TransformerSpec.from_config(
        layers, first.self_attn.num_heads, pre_norm=first.normalize_before
    )
    with torch.no_grad():
        converter.set_transformer_encoder(spec.encoder, model.encoder.float().requires_grad_(False))
        converter.set_transformer_decoder(spec.decoder, model.decoder.float().requires_grad_(False))
    words = ["<blank>" if word == "<pad>" else word for word in dictionary.symbols]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization=compute_type)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Translator(folder, compute_type=compute_type, **options)
