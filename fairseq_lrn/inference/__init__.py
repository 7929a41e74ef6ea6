"""Translates with a trained model: natively on the CPU where it can, and with PyTorch's modules elsewhere."""

from .generator import BeamSearchGenerator, BeamSearchGeneratorWithAlignment
from .translator import COMPUTE_TYPES, Translator

__all__ = ["COMPUTE_TYPES", "BeamSearchGenerator", "BeamSearchGeneratorWithAlignment", "Translator"]
