"""What is at padding does not matter, whatever it is."""

from torch import Tensor

from ..ops.scan import check_padding_mask


def zero_padding(x: Tensor, padding_mask: Tensor) -> Tensor:
    """Return ``x`` with zeros at padding, since zero times what is not finite is no zero.

    Args:
        x: (T, B, C)
        padding_mask: (B, T) bool, True at padding

    Raises:
        TypeError: ``padding_mask`` is not bool
        ValueError: its shape, device or layout is not ``x``'s
    """
    check_padding_mask(padding_mask, x.size(1), x.size(0), x)
    return x.masked_fill(padding_mask.t().unsqueeze(2), 0.0)
