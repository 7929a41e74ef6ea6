"""The units that LRN is compared with, beside their formulas written out."""

import pytest
import torch
from torch import nn

from fairseq_lrn.modules import (
    CELLS,
    LRN,
    LockedDropout,
    StackedRecurrent,
    Unrolled,
    build_cell,
    build_recurrent,
)

SIZE, HIDDEN, LENGTHS = 3, 4, [5, 2, 7, 1]
every_cell = pytest.mark.parametrize("cell", CELLS)
each_way = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
close = torch.testing.assert_close


def make(cell, bidirectional=False):
    torch.manual_seed(1)
    rnn = build_recurrent(cell, SIZE, HIDDEN, bidirectional).double()
    for parameter in rnn.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return rnn


def gru(x, h, w):
    """Cho et al., 2014, as in nn.GRU's documentation."""
    r, z, n = (x @ w["weight_ih_l0"].t() + w["bias_ih_l0"]).chunk(3, 1)
    hr, hz, hn = (h @ w["weight_hh_l0"].t() + w["bias_hh_l0"]).chunk(3, 1)
    z = 1 / (1 + (-z - hz).exp())
    n = (n + hn / (1 + (-r - hr).exp())).tanh()
    h = (1 - z) * n + z * h
    return h, h


def lstm(x, state, w):
    """Hochreiter and Schmidhuber, 1997, as in nn.LSTM's documentation."""
    h, c = state.chunk(2, 1)
    gates = x @ w["weight_ih_l0"].t() + w["bias_ih_l0"] + h @ w["weight_hh_l0"].t() + w["bias_hh_l0"]
    i, f, g, o = gates.chunk(4, 1)
    c = c / (1 + (-f).exp()) + g.tanh() / (1 + (-i).exp())
    h = c.tanh() / (1 + (-o).exp())
    return h, torch.cat([h, c], 1)


def atr(x, h, w):
    p = x @ w["input.weight"].t() + w["input.bias"]
    q = h @ w["hidden.weight"].t() + w["hidden.bias"]
    h = (p / (1 + (-p - q).exp()) + h / (1 + (q - p).exp())).tanh()
    return h, h


def sru(x, c, w):
    x_f, x_r, x_c, x_h = (x @ part.t() for part in w["weight"].chunk(4))
    v_f, v_r = w["v"].chunk(2)
    b_f, b_r = w["bias"].chunk(2)
    f = 1 / (1 + (-x_f - v_f * c - b_f).exp())
    r = 1 / (1 + (-x_r - v_r * c - b_r).exp())
    c = f * c + (1 - f) * x_c
    return r * c + (1 - r) * x_h, c


@pytest.mark.parametrize("formula", [gru, lstm, atr, sru], ids=lambda formula: formula.__name__)
def test_formula(formula):
    rnn = make(formula.__name__)
    weights = {name.split("rnn.")[-1].replace("cells.0.", ""): p for name, p in rnn.named_parameters()}
    input = torch.randn(6, 2, SIZE, dtype=torch.double)
    hx = torch.randn(1, 2, (2 if formula is lstm else 1) * HIDDEN, dtype=torch.double)
    expected, state = [], hx[0]
    for x in input:
        output, state = formula(x, state, weights)
        expected.append(output)
    output, h_n = rnn(input, hx)
    close(output, torch.stack(expected))
    close(h_n, state[None])


@every_cell
def test_cells_step_by_step_are_the_layer(cell):
    rnn = make(cell)
    unrolled = Unrolled(build_cell(cell, SIZE, HIDDEN)).double()
    with torch.no_grad():
        for one, other in zip(unrolled.parameters(), rnn.parameters()):
            one.copy_(other)
    input = torch.randn(6, 3, SIZE, dtype=torch.double)
    mask = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    for one, other in zip(unrolled(input, None, mask), rnn(input, None, mask)):
        keep = ~mask.t().unsqueeze(2) if one.size(0) == 6 else torch.ones(1, dtype=torch.bool)
        close(one * keep, other * keep)


def test_lrn_is_lrn():
    assert isinstance(build_recurrent("lrn", 3, 4), LRN)
    assert build_recurrent("olrn", 3, 4, activation="identity").output_gate


@every_cell
@each_way
def test_gradients(cell, bidirectional):
    rnn = make(cell, bidirectional)
    mask = torch.tensor([[False, True, False], [False, False, True]])
    input = torch.randn(3, 2, SIZE, dtype=torch.double, requires_grad=True)

    def outputs(input, *parameters):
        output, h_n = rnn(input, None, mask)
        return output.masked_fill(mask.t().unsqueeze(2), 0), h_n

    assert torch.autograd.gradcheck(outputs, (input, *rnn.parameters()))


@every_cell
@each_way
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_does_not_matter(cell, bidirectional, side):
    rnn = make(cell, bidirectional)
    steps = max(LENGTHS) + 1
    input = torch.randn(steps, len(LENGTHS), SIZE, dtype=torch.double)
    mask = torch.ones(len(LENGTHS), steps, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        real = {
            "left": slice(steps - length, None),
            "right": slice(length),
            "between": slice(0, 2 * length, 2),
        }
        at = torch.arange(steps)[real[side]][:length]
        mask[i, at] = False
    output, h_n = rnn(input, None, mask)
    for i in range(len(LENGTHS)):
        at = ~mask[i]
        alone, last = rnn(input[at, i : i + 1])
        close(output[at, i : i + 1], alone)
        close(h_n[:, i : i + 1], last)


@every_cell
@each_way
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, 1e300])
def test_padding_content_has_no_gradient(cell, bidirectional, value):
    rnn = make(cell, bidirectional)
    mask = torch.tensor([[False, True, False, True], [False] * 4, [True, True, True, False]])
    padding = mask.t().unsqueeze(2)
    x, results = torch.randn(4, 3, SIZE, dtype=torch.double), []
    for content in (0.0, value):
        input = x.masked_fill(padding, content).requires_grad_()
        output, h_n = rnn(input, None, mask)
        (output.square().sum() + h_n.sum()).backward()
        assert not input.grad.masked_select(padding).any()
        results.append([output, h_n, input.grad, *(p.grad for p in rnn.parameters())])
        rnn.zero_grad()
    close(*results)


@every_cell
def test_any_byte_of_a_mask_but_zero_is_true(cell):
    rnn, input = make(cell, True), torch.randn(4, 3, SIZE, dtype=torch.double)
    bytes_ = torch.tensor([[0, 2, 0, 255], [0, 0, 0, 0], [1, 2, 64, 0]], dtype=torch.uint8)
    output, h_n = rnn(input, None, bytes_.view(torch.bool))
    expected, expected_state = rnn(input, None, bytes_ != 0)
    keep = bytes_.t().eq(0).unsqueeze(2)
    close(output * keep, expected * keep)
    close(h_n, expected_state)


@every_cell
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(4, 3, dtype=torch.bool), "padding_mask must have shape \\[3, 4\\]"),
        (torch.zeros(1, 4, dtype=torch.bool), "padding_mask must have shape \\[3, 4\\]"),
        (torch.zeros(3, 4), "padding_mask must be torch.bool, but is torch.float32"),
        (torch.zeros(3, 4, dtype=torch.bool, device="meta"), "padding_mask must be on cpu"),
    ],
)
def test_masks_that_do_not_fit(cell, mask, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make(cell)(torch.randn(4, 3, SIZE, dtype=torch.double), None, mask)


GOOD = torch.zeros(4, 3, SIZE, dtype=torch.double)


@every_cell
@pytest.mark.parametrize(
    ("name", "input", "hx"),
    [
        ("input", GOOD.float(), None),
        ("input", GOOD.to(torch.complex64), None),
        ("input", GOOD.to("meta"), None),
        ("input", GOOD.to_sparse(), None),
        ("input", torch.nested.nested_tensor([GOOD[0], GOOD[1]]), None),
        ("input", GOOD[..., 1:], None),
        ("input", GOOD[0, 0], None),
        ("input", GOOD[None], None),
        ("hx", GOOD, GOOD.float()),
        ("hx", GOOD, GOOD.to("meta")),
        ("hx", GOOD, GOOD[:1, :1]),
    ],
)
def test_inputs_that_do_not_fit(cell, name, input, hx):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        make(cell)(input, hx)
    if name == "input":
        with pytest.raises((TypeError, ValueError), match="input must"):
            StackedRecurrent(cell, SIZE, HIDDEN, 2).double()(input)


@every_cell
@each_way
def test_a_state_is_carried_over_padding(cell, bidirectional):
    rnn = make(cell, bidirectional)
    input = torch.randn(4, 2, SIZE, dtype=torch.double)
    mask = torch.tensor([[True, False, False, True], [True] * 4])
    hx = torch.randn(1 + bidirectional, 2, (2 if cell == "lstm" else 1) * HIDDEN, dtype=torch.double)
    output, h_n = rnn(input, hx, mask)
    alone, last = rnn(input[1:3, :1], hx[:, :1])
    close(output[1:3, :1], alone)
    close(h_n, torch.cat([last, hx[:, 1:]], 1))


@every_cell
def test_a_sequence_in_two_parts(cell):
    rnn = make(cell)
    input = torch.randn(7, 3, SIZE, dtype=torch.double)
    output, h_n = rnn(input)
    first, state = rnn(input[:3])
    second, state = rnn(input[3:], state)
    close(torch.cat([first, second]), output)
    close(state, h_n)


@every_cell
@each_way
def test_stacked_layers_read_one_another(cell, bidirectional):
    stack = StackedRecurrent(cell, SIZE, HIDDEN, 3, bidirectional=bidirectional, dropout=0.5).double().eval()
    input = torch.randn(5, 2, SIZE, dtype=torch.double)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    output, states = stack(input, None, mask)
    x = input
    for layer, state in zip(stack.layers, states):
        x, last = layer(x, None, mask)
        close(state, last)
    close(output, x)
    assert output.size(2) == stack.output_size == HIDDEN * (1 + bidirectional)


@every_cell
def test_stacked_layers_carry_their_states(cell):
    stack = StackedRecurrent(cell, SIZE, HIDDEN, 2).double()
    input = torch.randn(7, 3, SIZE, dtype=torch.double)
    output, states = stack(input)
    first, middle = stack(input[:3])
    second, last = stack(input[3:], middle)
    close(torch.cat([first, second]), output)
    for one, other in zip(last, states):
        close(one, other)


def test_locked_dropout_zeroes_a_channel_throughout():
    torch.manual_seed(1)
    x = LockedDropout(0.5)(torch.ones(6, 3, 40))
    assert x.eq(x[0]).all() and set(x.unique().tolist()) == {0.0, 2.0}
    assert len(x[0].unique(dim=0)) == 3  # a mask of its own for each sequence
    close(LockedDropout(0.5).eval()(x), x)


@pytest.mark.parametrize(
    ("cell", "activation", "words"),
    [
        ("rnn", "tanh", "cell must be one of lrn, olrn, gru, lstm, atr, sru, got 'rnn'"),
        ("gru", "identity", "activation must be 'tanh' with cell 'gru', got 'identity'"),
        ("lrn", "relu", "activation"),
    ],
)
def test_errors(cell, activation, words):
    with pytest.raises(ValueError, match=words):
        build_recurrent(cell, 3, 4, activation=activation)


def test_a_stack_has_layers():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        StackedRecurrent("lrn", 3, 4, 0)
