"""Translates with a trained model: natively on the CPU where possible, otherwise with PyTorch's modules."""

from .generator import BeamSearchGenerator, BeamSearchGeneratorWithAlignment
from .translator import COMPUTE_TYPES, Translator

__all__ = ["COMPUTE_TYPES", "BeamSearchGenerator", "BeamSearchGeneratorWithAlignment", "Translator"]
