"""The recurrent units that LRN is compared with. All are called as LRN is, with a padding mask."""

from typing import List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..ops import linear, lrn_scan
from ..ops.scan import check_padding_mask
from .inputs import check_like, check_sequences, zero_padding
from .linear import project
from .lrn import LRN

CELLS = ("lrn", "olrn", "gru", "lstm", "atr", "sru")


class LRNCell(nn.Module):
    """One step of :class:`LRN`, or of oLRN with ``output_gate``."""

    def __init__(self, input_size: int, hidden_size: int, activation: str, output_gate: bool) -> None:
        super().__init__()
        self.input_size, self.state_size = input_size, hidden_size
        self.rnn = LRN(input_size, hidden_size, activation=activation, output_gate=output_gate)

    def project(self, input: Tensor) -> Tensor:
        """The part that does not depend on the state: (..., input_size) to (..., 3·H or 4·H)."""
        return linear(input, self.rnn.weight_ih_l0, self.rnn.bias_ih_l0)

    def scan(
        self,
        projections: Tensor,
        state: Optional[Tensor] = None,
        padding_mask: Optional[Tensor] = None,
        reverse: bool = False,
    ) -> Tensor:
        """All states (T, B, H) of a sequence of projections, from a state (B, H), zeros if None."""
        return lrn_scan(
            projections,
            state,
            padding_mask,
            activation=self.rnn.activation,
            output_gate=self.rnn.output_gate,
            reverse=reverse,
        )

    def step(self, x: Tensor, state: Tensor) -> Tuple[Tensor, Tensor]:
        """Output and next state, both (B, H), from one step's projection and the state (B, H)."""
        state = self.scan(x[None], state)[0]
        return state, state


class GRUCell(nn.GRUCell):
    """``nn.GRUCell``, called as the others are."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = hidden_size

    def project(self, input: Tensor) -> Tensor:
        """Nothing: ``nn.GRUCell`` projects at each step."""
        return input

    def step(self, x: Tensor, state: Tensor) -> Tuple[Tensor, Tensor]:
        """Output and next state, both (B, H), from one step's input and the state (B, H)."""
        state = self(x, state)
        return state, state


class LSTMCell(nn.LSTMCell):
    """``nn.LSTMCell``, called as the others are."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = 2 * hidden_size

    def project(self, input: Tensor) -> Tensor:
        """Nothing: ``nn.LSTMCell`` projects at each step."""
        return input

    def step(self, x: Tensor, state: Tensor) -> Tuple[Tensor, Tensor]:
        """Output (B, H) and next state h | c (B, 2·H), from one step's input and the state."""
        h, c = self(x, state.chunk(2, 1))
        return h, torch.cat([h, c], 1)


class ATRCell(nn.Module):
    """Addition-subtraction twin-gated recurrent unit (Zhang et al., EMNLP 2018)::

    p = x W + b         i = sigmoid(p + q)
    q = h U + b'        f = sigmoid(p - q)        h' = tanh(i * p + f * h)
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.state_size = input_size, hidden_size
        self.input = nn.Linear(input_size, hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.orthogonal_(self.hidden.weight)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.hidden.bias)

    def project(self, input: Tensor) -> Tensor:
        """The part that does not depend on the state: (..., input_size) to (..., hidden_size)."""
        if not torch.jit.is_scripting():
            return project(self.input, input)
        return self.input(input)

    def step(self, p: Tensor, state: Tensor) -> Tuple[Tensor, Tensor]:
        """Output and next state, both (B, H), from one step's projection and the state (B, H)."""
        q = self.hidden(state)
        state = torch.tanh(torch.sigmoid(p + q) * p + torch.sigmoid(p - q) * state)
        return state, state


class SRUCell(nn.Module):
    """Simple recurrent unit (Lei et al., EMNLP 2018)::

    x_f, x_r, x_c, x_h = x W
    f = sigmoid(x_f + v_f * c + b_f)        c' = f * c + (1 - f) * x_c
    r = sigmoid(x_r + v_r * c + b_r)        h = r * c' + (1 - r) * x_h
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.state_size = input_size, hidden_size
        self.weight = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.v = nn.Parameter(torch.zeros(2 * hidden_size))
        self.bias = nn.Parameter(torch.zeros(2 * hidden_size))
        for part in self.weight.detach().chunk(4):
            nn.init.xavier_uniform_(part)

    def project(self, input: Tensor) -> Tensor:
        """The part that does not depend on the state: (..., input_size) to (..., 4·hidden_size)."""
        return linear(input, self.weight)

    def step(self, x: Tensor, state: Tensor) -> Tuple[Tensor, Tensor]:
        """Output and next state, both (B, H), from one step's projection (B, 4·H) and the state (B, H)."""
        gates, x_c, x_h = x.split([2 * self.state_size, self.state_size, self.state_size], 1)
        f, r = torch.sigmoid(gates + self.v * state.repeat(1, 2) + self.bias).chunk(2, 1)
        state = f * state + (1 - f) * x_c
        return r * state + (1 - r) * x_h, state


class Unrolled(nn.Module):
    """A layer of cells that PyTorch runs step by step. The second of ``cells`` runs backward."""

    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(
        self, input: Tensor, hx: Optional[Tensor] = None, padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """As :meth:`LRN.forward` on (T, B, C), but with zeros at padding: output (T, B, D·H), last states."""
        if not torch.jit.is_scripting():
            first = self.cells[0]
            _check(input, hx, first.input_size, (len(self.cells), first.state_size), next(self.parameters()))
        if padding_mask is not None:
            input = zero_padding(input, padding_mask)
        outputs: List[Tensor] = []
        states: List[Tensor] = []
        for i, cell in enumerate(self.cells):
            projected = cell.project(input).unbind(0)
            state = input.new_zeros([input.size(1), cell.state_size]) if hx is None else hx[i]
            output: List[Tensor] = []
            for step in range(len(projected)):
                t = len(projected) - 1 - step if i > 0 else step
                y, new = cell.step(projected[t], state)
                state = new if padding_mask is None else state.where(padding_mask[:, t : t + 1], new)
                output.append(y)
            if i > 0:
                output.reverse()
            outputs.append(torch.stack(output))
            states.append(state)
        y = torch.cat(outputs, 2)
        if padding_mask is not None:
            y = y.masked_fill(padding_mask.t().unsqueeze(2), 0.0)
        return y, torch.stack(states)


class Native(nn.Module):
    """A layer ``nn.GRU`` or ``nn.LSTM``, which know padding only in packed sequences.

    On CUDA the sequences are packed, so none may be all padding. On the CPU packing makes training 1.4 to 6
    times as slow. There a direction runs over the words and then over padding, which sets the gates so that
    the state is carried over.
    """

    __constants__ = ("lstm",)

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.lstm = isinstance(rnn, nn.LSTM)

    def forward(
        self, input: Tensor, hx: Optional[Tensor] = None, padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """As :meth:`LRN.forward` on (T, B, C), but zeros at padding; LSTM's states are h | c, (D, B, 2·H)."""
        if not torch.jit.is_scripting():
            state = (1 + self.rnn.bidirectional, (1 + self.lstm) * self.rnn.hidden_size)
            _check(input, hx, self.rnn.input_size, state, self.rnn.weight_ih_l0)
        if padding_mask is not None:
            check_padding_mask(padding_mask, input.size(1), input.size(0), input)
        if not torch.jit.is_scripting() and (padding_mask is None or input.is_cuda):
            return self._forward_packed(input, hx, padding_mask)
        return self._forward_padded(input, hx, padding_mask)

    @torch.jit.unused
    def _forward_packed(
        self, input: Tensor, hx: Optional[Tensor], padding_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        state = tuple(x.contiguous() for x in hx.chunk(2, 2)) if self.lstm and hx is not None else hx
        if padding_mask is None:
            output, state = self.rnn(input, state)
        else:
            order = _words_first(padding_mask).unsqueeze(2)
            lengths = padding_mask.logical_not().sum(1).cpu()
            packed = pack_padded_sequence(
                input.gather(0, order.expand_as(input)), lengths, enforce_sorted=False
            )
            packed, state = self.rnn(packed, state)
            sorted_output, _ = pad_packed_sequence(packed, total_length=input.size(0))
            output = torch.zeros_like(sorted_output).scatter(0, order.expand_as(sorted_output), sorted_output)
        return output, torch.cat(state, 2) if self.lstm else state

    @torch.jit.unused
    def _weights(self) -> List[Tensor]:
        return [weight for direction in self.rnn.all_weights for weight in direction]

    def _forward_padded(
        self, input: Tensor, hx: Optional[Tensor], padding_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        size, (steps, batch) = self.rnn.hidden_size, input.shape[:2]
        if padding_mask is None:
            padding_mask = torch.zeros(batch, steps, dtype=torch.bool, device=input.device)
        # what padding adds to the gates of GRU, r | z | n, and of LSTM, i | f | g | o
        shut = torch.tensor([-1e4, 1e4, 0.0, 0.0] if self.lstm else [0.0, 1e4, 0.0])
        shut = shut.to(input).repeat_interleave(size).unsqueeze(1)
        padding = padding_mask.t().unsqueeze(2)
        input = torch.cat([input.masked_fill(padding, 0.0), padding.type_as(input)], 2)
        forward = _words_first(padding_mask)
        lengths = padding_mask.logical_not().sum(1)
        backward = forward.gather(
            0, (lengths - 1 - torch.arange(steps, device=input.device).unsqueeze(1)) % steps
        )
        last = (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, size)
        weights: List[Tensor] = (
            self.rnn._flat_weights if torch.jit.is_scripting() else self._weights()  # type: ignore[assignment]
        )
        outputs: List[Tensor] = []
        states: List[Tensor] = []
        for i in range(len(weights) // 4):
            parameters = weights[4 * i : 4 * i + 4]
            parameters[0] = torch.cat([parameters[0], shut], 1)
            order = (backward if i > 0 else forward).unsqueeze(2)
            x = input.gather(0, order.expand_as(input))
            if hx is None:
                state = input.new_zeros([1, batch, 2 * size if self.lstm else size])
            else:
                state = hx[i : i + 1].contiguous()
            if self.lstm:
                h, c = state.chunk(2, 2)
                hc = [h.contiguous(), c.contiguous()]
                output, _, c = torch.lstm(x, hc, parameters, True, 1, 0.0, False, False, False)
                h = output.gather(0, last).where(lengths.gt(0).unsqueeze(1), h)
                state = torch.cat([h, c], 2)
            else:
                output, state = torch.gru(x, state, parameters, True, 1, 0.0, False, False, False)
            order = order.expand_as(output)
            outputs.append(torch.zeros_like(output).scatter(0, order, output).masked_fill(padding, 0.0))
            states.append(state)
        return torch.cat(outputs, 2), torch.cat(states)


def _check(
    input: Tensor, hx: Optional[Tensor], width: int, state: Tuple[int, int], parameter: Tensor
) -> None:
    """Raise unless ``input`` is (T, B, width), T > 0, and hx, if given, is (D, B, S) for a state (D, S)."""
    check_sequences("input", input, width, parameter)
    if len(input) == 0:
        raise ValueError("input must have at least one step, got none")
    if hx is not None:
        check_like("hx", hx, parameter)
        shape = [state[0], input.size(1), state[1]]
        if list(hx.shape) != shape:
            raise ValueError(f"hx must have shape {shape}, got {list(hx.shape)}")


def _words_first(padding_mask: Tensor) -> Tensor:
    """Return for each sentence of (B, T) the positions of its words, then those of its padding: (T, B)."""
    return padding_mask.byte().argsort(dim=1, stable=True).t()


def build_cell(cell: str, input_size: int, hidden_size: int, activation: str = "tanh") -> nn.Module:
    """Make one step of a recurrent unit, for recurrences that need other results at each step.

    It has ``project(input)``, for all steps at once, and ``step(projection, state)``. The step returns output
    (B, H) and next state (B, ``state_size``).

    Args:
        cell: "lrn", "olrn", "gru", "lstm", "atr" or "sru"
        input_size: width of the input
        hidden_size: H
        activation: "tanh" or "identity", for lrn and olrn; "tanh" for the others

    Raises:
        ValueError: there is no such cell, or it does not take the activation
    """
    if cell in ("lrn", "olrn"):
        return LRNCell(input_size, hidden_size, activation, cell == "olrn")
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if activation != "tanh":
        raise ValueError(f"activation must be 'tanh' with cell {cell!r}, got {activation!r}")
    units = {"gru": GRUCell, "lstm": LSTMCell, "atr": ATRCell, "sru": SRUCell}
    return units[cell](input_size, hidden_size)


def build_recurrent(
    cell: str, input_size: int, hidden_size: int, bidirectional: bool = False, activation: str = "tanh"
) -> nn.Module:
    """Make one layer of a recurrent unit, which is called as :class:`LRN` is, on (T, B, C).

    Arguments and errors are those of :func:`build_cell`. ``bidirectional`` adds a backward direction.
    """
    if cell in ("lrn", "olrn"):
        return LRN(
            input_size,
            hidden_size,
            bidirectional=bidirectional,
            activation=activation,
            output_gate=cell == "olrn",
        )
    if cell in ("gru", "lstm") and activation == "tanh":
        rnn = nn.GRU if cell == "gru" else nn.LSTM
        return Native(rnn(input_size, hidden_size, bidirectional=bidirectional))
    return Unrolled(
        *(build_cell(cell, input_size, hidden_size, activation) for _ in range(1 + bidirectional))
    )


class LockedDropout(nn.Dropout1d):
    """Dropout of (T, B, C) with one mask for all positions of a sequence."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (T, B, C) with the same channels of a sequence zeroed throughout."""
        if input.dim() != 3:
            raise ValueError(f"input must have shape (T, B, C), got {list(input.shape)}")
        return super().forward(input.permute(1, 2, 0)).permute(2, 0, 1)


class StackedRecurrent(nn.Module):
    """Layers of a recurrent unit; each reads the one below.

    Args:
        cell: "lrn", "olrn", "gru", "lstm", "atr" or "sru"
        input_size: width of the input
        hidden_size: H, of each direction
        num_layers: number of layers, at least 1
        bidirectional: with a backward direction, so D is 2 instead of 1
        dropout: probability with which an input of a layer above the first is zero at every position of a
            sequence (Gal and Ghahramani, NeurIPS 2016)
        activation: "tanh" or "identity", for lrn and olrn; "tanh" for the others

    Raises:
        ValueError: there is no such cell or number of layers, or the cell does not take the activation
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.output_size = hidden_size * (1 + bidirectional)
        self.layers = nn.ModuleList(
            build_recurrent(cell, size, hidden_size, bidirectional, activation)
            for size in [input_size] + [self.output_size] * (num_layers - 1)
        )
        self.dropout = LockedDropout(dropout)

    def forward(
        self,
        input: Tensor,
        states: Optional[List[Tensor]] = None,
        padding_mask: Optional[Tensor] = None,
        outputs: Optional[List[Tensor]] = None,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Run all layers over (T, B, input_size); ``padding_mask`` (B, T) is True at padding.

        If ``outputs`` is a list, each layer's output is added to it.

        Returns the output (T, B, D·H) and each layer's last states (D, B, H), LSTM's h | c (D, B, 2·H).
        ``states`` takes such states, zeros if None.
        """
        last = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                input = self.dropout(input)
            input, state = layer(input, None if states is None else states[i], padding_mask)
            last.append(state)
            if outputs is not None:
                outputs.append(input)
        return input, last
