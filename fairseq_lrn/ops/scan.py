"""The LRN recurrence as one operator."""

import warnings
from typing import Optional

import torch
from torch import Tensor

from ._library import loaded, transformed
from .reference import lrn_scan_reference

_scan = torch.ops.fairseq_lrn.lrn_scan if loaded else lrn_scan_reference
_cuda = loaded and torch._C._dispatch_has_kernel_for_dispatch_key("fairseq_lrn::lrn_scan", "CUDA")


def lrn_scan(
    projections: Tensor,
    initial_state: Optional[Tensor] = None,
    padding_mask: Optional[Tensor] = None,
    activation: str = "tanh",  # this and the rest by keyword; TorchScript has no keyword-only ones
    output_gate: bool = False,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    r"""Run the recurrence of a Lightweight Recurrent Network over a batch of sequences.

    Zhang and Sennrich, *A Lightweight Recurrent Network for Sequence Modeling*, ACL 2019, section 3. q, k and
    v are linear projections of the input, computed for all time steps beforehand:

    .. math::
        i_t &= \sigma(k_t + h_{t-1}) \\
        f_t &= \sigma(q_t - h_{t-1}) \\
        c_t &= g(i_t \odot v_t + f_t \odot h_{t-1}) \\
        h_t &= c_t, \text{ or with an output gate (oLRN) } \sigma(o_t - c_t) \odot c_t

    Where ``padding_mask`` is True, :math:`h_t = h_{t-1}`, and the projections are not read.

    Differentiable in ``projections`` and ``initial_state``, once, by ``backward()``. The transforms of
    ``torch.func`` and forward-mode AD use :func:`lrn_scan_reference`, which is slower and differentiable any
    number of times. TorchScript and ``torch.compile`` take it as one operator. The state is in float32
    (float64 for float64 input) for any dtype of the tensors. ``FlopCounterMode`` counts each addition,
    subtraction, multiplication, sigmoid and tanh of the formulas as one operation, and twice that backward.

    Args:
        projections: (T, B, 3·D), q | k | v along the last axis, or (T, B, 4·D), q | k | v | o, with
            ``output_gate``. They are float16, bfloat16, float32 or float64, with any strides. T and B may be
            0.
        initial_state: (B, D), of projections' dtype (under autocast it is cast); zeros if None.
        padding_mask: (B, T) bool, True at padding. Padding may be anywhere.
        activation: g, "tanh" or "identity".
        output_gate: whether projections hold o, the output gate's part.
        reverse: whether time runs from T-1 to 0. The result still has the input's order.
        bidirectional: run both directions. The last axis of projections holds the forward direction's q | k |
            v (| o) and then the backward direction's. initial_state is (B, 2·D) and the result (T, B, 2·D),
            forward | backward.

    Returns:
        (T, B, D), or (T, B, 2·D) if bidirectional: every state, in projections' dtype.

    Raises:
        TypeError: a dtype is not one of the above, or initial_state's differs from projections'.
        ValueError: a shape, a device, or activation is not one of the above, a tensor is not strided, or
            reverse and bidirectional are both given.
    """
    if activation != "tanh" and activation != "identity":
        raise ValueError(f"activation must be 'tanh' or 'identity', but is '{activation}'")
    if reverse and bidirectional:
        raise ValueError("reverse must be False with bidirectional, which runs both directions")
    check_strided("projections", projections)
    dtype = projections.dtype
    if (
        dtype != torch.float32
        and dtype != torch.float16
        and dtype != torch.bfloat16
        and dtype != torch.float64
    ):
        raise TypeError(
            f"projections must be float16, bfloat16, float32 or float64, but is {dtype_name(dtype)}"
        )
    if projections.dim() != 3:
        raise ValueError(f"projections must be (T, B, width), but has shape {list(projections.shape)}")
    steps, batch, width = projections.shape
    parts = 4 if output_gate else 3
    directions = 2 if bidirectional else 1
    if width % (parts * directions) != 0:
        raise ValueError(
            f"projections must have a last axis that is a multiple of {parts * directions} ({parts} parts, "
            f"{directions} direction(s)), but has shape {list(projections.shape)}"
        )
    if initial_state is not None:
        check_strided("initial_state", initial_state)
        if list(initial_state.shape) != [batch, width // parts]:
            raise ValueError(
                f"initial_state must have shape {[batch, width // parts]} to fit projections of shape "
                f"{list(projections.shape)}, but has {list(initial_state.shape)}"
            )
        if initial_state.device != projections.device:
            raise ValueError(
                f"initial_state must be on projections' device {projections.device}, but is on "
                f"{initial_state.device}"
            )
        if initial_state.dtype != dtype and not autocast_enabled(projections):
            raise TypeError(
                f"initial_state must be {dtype_name(dtype)} as projections, but is "
                f"{dtype_name(initial_state.dtype)}"
            )
    if padding_mask is not None:
        check_padding_mask(padding_mask, batch, steps, projections)
    if _has_kernel(projections):
        return _scan(
            projections,
            initial_state,
            padding_mask,
            activation=activation,
            output_gate=output_gate,
            reverse=reverse,
            bidirectional=bidirectional,
        )
    _warn_no_kernel(projections)
    return lrn_scan_reference(
        projections,
        initial_state,
        padding_mask,
        activation=activation,
        output_gate=output_gate,
        reverse=reverse,
        bidirectional=bidirectional,
    )


def check_padding_mask(padding_mask: Tensor, batch: int, steps: int, x: Tensor) -> None:
    """Raise unless ``padding_mask`` is (batch, steps), bool, strided and on ``x``'s device."""
    check_strided("padding_mask", padding_mask)
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask must be torch.bool, but is {dtype_name(padding_mask.dtype)}")
    if list(padding_mask.shape) != [batch, steps]:
        raise ValueError(
            f"padding_mask must have shape {[batch, steps]} (batch, time), but has {list(padding_mask.shape)}"
        )
    if padding_mask.device != x.device:
        raise ValueError(
            f"padding_mask must be on {x.device} as the input is, but is on {padding_mask.device}"
        )


def check_strided(argument: str, x: Tensor) -> None:
    """Raise unless ``x`` is strided and not nested."""
    if x.is_nested:
        raise ValueError(f"{argument} must not be nested")
    if x.layout != torch.strided:
        raise ValueError(f"{argument} must be strided, neither sparse nor of another layout")


def dtype_name(dtype: torch.dtype) -> str:
    """``str(dtype)``, in TorchScript too, where dtypes are numbers."""
    if not torch.jit.is_scripting():
        return str(dtype)
    names = [
        (torch.bool, "torch.bool"),
        (torch.uint8, "torch.uint8"),
        (torch.int8, "torch.int8"),
        (torch.int16, "torch.int16"),
        (torch.int32, "torch.int32"),
        (torch.int64, "torch.int64"),
        (torch.float16, "torch.float16"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.float32, "torch.float32"),
        (torch.float64, "torch.float64"),
        (torch.complex64, "torch.complex64"),
        (torch.complex128, "torch.complex128"),
    ]
    for known, name in names:
        if known == dtype:
            return name
    return "of another dtype"


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for ``x``'s device."""
    device = x.device.type
    if torch.jit.is_scripting():
        return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()
    else:
        return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _has_kernel(x: Tensor, cuda: bool = _cuda) -> bool:
    # A default, because TorchScript cannot read a global variable.
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out the body of just this form
        # ONNX has no such operator: it gets the steps one by one
        if torch.onnx.is_in_onnx_export() or (not torch.compiler.is_compiling() and transformed()):
            return False
    device = x.device.type
    return device == "cpu" or device == "meta" or (cuda and device == "cuda")


def _warn_no_kernel(x: Tensor) -> None:
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out the body of just this form
        if not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export():
            place = "torch.func and forward-mode AD" if transformed() else x.device.type
            warnings.warn(
                f"lrn_scan is not built for {place}; the much slower PyTorch definition is used",
                stacklevel=3,
            )
