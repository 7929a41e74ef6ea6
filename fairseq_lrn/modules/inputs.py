"""Checks of the inputs of modules, and zeros at padding."""

import torch
from torch import Tensor

from ..ops._library import eager
from ..ops.scan import autocast_enabled, check_padding_mask, check_strided, dtype_name


def check_like(argument: str, x: Tensor, parameter: Tensor) -> None:
    """Raise unless ``x`` is strided, on the device of a parameter and, without autocast, of its dtype."""
    check_strided(argument, x)
    if x.device != parameter.device:
        raise ValueError(
            f"{argument} must be on {parameter.device} as the parameters are, but is on {x.device}"
        )
    if x.dtype != parameter.dtype and not autocast_enabled(x):
        own = dtype_name(parameter.dtype)
        raise TypeError(f"{argument} must be {own} as the parameters are, got {dtype_name(x.dtype)}")


def check_sequences(argument: str, x: Tensor, width: int, parameter: Tensor) -> None:
    """Raise unless ``x`` is (T, B, width) and passes :func:`check_like`."""
    check_like(argument, x, parameter)
    if x.dim() != 3 or x.size(2) != width:
        raise ValueError(f"{argument} must have shape (T, B, {width}), got {list(x.shape)}")


def zero_padding(x: Tensor, padding_mask: Tensor) -> Tensor:
    """Return ``x`` with zeros at padding, unless what is there is small: zero times that is not always zero.

    Args:
        x: (T, B, C)
        padding_mask: (B, T) bool, True at padding

    Returns:
        (T, B, C). On the CPU it is ``x`` itself if all of its padding is between -1000 and 1000; checking is
        cheaper than writing. Other finite numbers may overflow later.

    Raises:
        TypeError: ``padding_mask`` is not bool
        ValueError: its shape, device or layout is not ``x``'s
    """
    check_padding_mask(padding_mask, x.size(1), x.size(0), x)
    if not torch.jit.is_scripting():
        look = x.device.type == "cpu" and eager()
        if look and bool((x.detach()[padding_mask.t()].abs() < 1000).all()):
            return x
    return x.masked_fill(padding_mask.t().unsqueeze(2), 0.0)
