"""Translates with a trained model: natively on the CPU where it can, and with PyTorch's modules elsewhere."""

from .generator import BeamSearchGenerator, BeamSearchGeneratorWithAlignment
from .translator import Translator

__all__ = ["BeamSearchGenerator", "BeamSearchGeneratorWithAlignment", "Translator"]
