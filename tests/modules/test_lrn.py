"""LRN beside nn.GRU, whose interface it has, and beside the definition of the recurrence."""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from fairseq_lrn.modules import LRN
from fairseq_lrn.ops import lrn_scan_reference

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
quiet_torchscript = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
close = torch.testing.assert_close

VARIANTS = [
    {},
    {"bidirectional": True},
    {"bidirectional": True, "output_gate": True, "activation": "identity", "bias": False},
    {"bidirectional": True, "layer_norm": True},
    {"layer_norm": True, "bias": False},
]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options) or "plain")

SIZE, HIDDEN, LAYERS = 5, 4, 2
LENGTHS = [3, 6, 1, 6, 4]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def make(device="cpu", dtype=None, **options):
    """An LRN with parameters of every kind away from their initial values."""
    rnn = LRN(SIZE, HIDDEN, LAYERS, device=device, dtype=dtype, **options)
    for parameter in rnn.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return rnn


def make_state(rnn, batch):
    directions = 2 if rnn.bidirectional else 1
    return torch.randn(rnn.num_layers * directions, batch, rnn.hidden_size).to(rnn.weight_ih_l0)


def make_sentences(device="cpu", dtype=None, lengths=LENGTHS):
    return [torch.randn(length, SIZE, device=device, dtype=dtype) for length in lengths]


def run_alone(rnn, sentences, hx=None):
    """Outputs, a list, and final states of sentences that are run one by one."""
    results = [
        rnn(sentence, None if hx is None else hx[:, lane].contiguous())
        for lane, sentence in enumerate(sentences)
    ]
    return [output for output, _ in results], torch.stack([h_n for _, h_n in results], 1)


# ---------------------------------------------------------------- the interface of nn.GRU


@on_every_device
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, SIZE), (1, 1, SIZE), (6, 0, SIZE), (6, SIZE)], ids=str)
def test_shapes_are_those_of_gru(device, bidirectional, batch_first, with_state, shape):
    arguments = (SIZE, HIDDEN, LAYERS, True, batch_first, 0.0, bidirectional)
    gru, lrn = nn.GRU(*arguments).to(device), LRN(*arguments).to(device)
    batched = len(shape) == 3
    x = torch.randn(shape, device=device)
    if batched and batch_first:
        x = x.transpose(0, 1)
    hx = None
    if with_state:
        hx = torch.randn(LAYERS * (1 + bidirectional), *shape[1:-1], HIDDEN, device=device)
    for actual, expected in zip(lrn(x, hx), gru(x, hx)):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert actual.device == expected.device


@on_every_device
@pytest.mark.parametrize("kind", ["sorted", "unsorted", "pack_sequence"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_form_is_that_of_gru(device, kind, batch_first):
    lengths = LENGTHS if kind == "unsorted" else sorted(LENGTHS, reverse=True)
    sentences = make_sentences(device, lengths=lengths)
    if kind == "pack_sequence":
        packed = pack_sequence(sentences)
    else:
        padded = pad_sequence(sentences, batch_first)
        packed = pack_padded_sequence(
            padded, torch.tensor(lengths), batch_first, enforce_sorted=kind == "sorted"
        )
    gru = nn.GRU(SIZE, HIDDEN, LAYERS, batch_first=batch_first, bidirectional=True).to(device)
    lrn = make(device, batch_first=batch_first, bidirectional=True)
    (actual, actual_state), (expected, expected_state) = lrn(packed), gru(packed)
    assert isinstance(actual, PackedSequence)
    assert actual.data.shape == expected.data.shape
    assert actual_state.shape == expected_state.shape
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a is b is None or torch.equal(a, b)


def test_constructor_keeps_the_arguments_of_gru():
    arguments = (SIZE, HIDDEN, 3, False, True, 0.25, True)
    gru, lrn = nn.GRU(*arguments), LRN(*arguments)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ):
        assert getattr(lrn, name) == getattr(gru, name)
    assert repr(lrn) == repr(gru).replace("GRU", "LRN")
    assert repr(LRN(5, 4, activation="identity", output_gate=True, layer_norm=True)) == (
        "LRN(5, 4, activation='identity', output_gate=True, layer_norm=True)"
    )
    assert lrn.flatten_parameters() is None


def test_dropout_without_a_layer_above_warns_as_gru_does():
    for unit in (nn.GRU, LRN):
        with pytest.warns(UserWarning, match="num_layers"):
            unit(SIZE, HIDDEN, dropout=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unit(SIZE, HIDDEN, 2, dropout=0.5)


@every_variant
def test_parameters(options):
    rnn = LRN(SIZE, HIDDEN, LAYERS, dtype=torch.float64, **options)
    directions = 2 if rnn.bidirectional else 1
    rows = directions * (4 if rnn.output_gate else 3) * HIDDEN
    expected = {}
    for layer, columns in enumerate((SIZE, directions * HIDDEN)):
        expected[f"weight_ih_l{layer}"] = (rows, columns)
        if rnn.bias:
            expected[f"bias_ih_l{layer}"] = (rows,)
        if rnn.layer_norm:
            expected[f"ln_weight_l{layer}"] = expected[f"ln_bias_l{layer}"] = (rows,)
    assert {name: tuple(p.shape) for name, p in rnn.named_parameters()} == expected
    assert {p.dtype for p in rnn.parameters()} == {torch.float64}
    flat = [parameter for layer in rnn.all_weights for parameter in layer]
    assert all(a is b for a, b in zip(flat, rnn.parameters())) and len(flat) == len(expected)


def test_initialisation_keeps_gradients_alive_in_a_deep_stack():
    rnn = LRN(64, 64, 8)
    rnn(torch.randn(20, 8, 64))[0][-1].sum().backward()
    norms = torch.stack([layer[0].grad.norm() for layer in rnn.all_weights])
    assert norms.max() < 3 * norms.min()
    before = copy.deepcopy(rnn.state_dict())
    rnn.reset_parameters()
    assert not torch.equal(rnn.weight_ih_l0, before["weight_ih_l0"])
    assert torch.equal(rnn.bias_ih_l7, torch.zeros(192))


# ---------------------------------------------------------------- the values


@on_every_device
@every_variant
@pytest.mark.parametrize("masked", [False, True])
def test_layers_compose_the_definition(device, options, masked):
    rnn = make(device, torch.float64, **options)
    x = torch.randn(6, 3, SIZE, device=device, dtype=torch.float64)
    hx = make_state(rnn, 3)
    mask = torch.rand(3, 6, device=device) < 0.4 if masked else None
    parts = 4 if rnn.output_gate else 3
    finals, h = [], x
    for layer in range(LAYERS):
        outputs = []
        for direction in range(2 if rnn.bidirectional else 1):
            rows = slice(direction * parts * HIDDEN, (direction + 1) * parts * HIDDEN)
            projections = h @ getattr(rnn, f"weight_ih_l{layer}")[rows].t()
            if rnn.bias:
                projections = projections + getattr(rnn, f"bias_ih_l{layer}")[rows]
            if rnn.layer_norm:
                mean = projections.mean(-1, keepdim=True)
                variance = projections.var(-1, unbiased=False, keepdim=True)
                projections = (projections - mean) / (variance + 1e-5).sqrt()
                projections = projections * getattr(rnn, f"ln_weight_l{layer}")[rows]
                projections = projections + getattr(rnn, f"ln_bias_l{layer}")[rows]
            states = lrn_scan_reference(
                projections,
                hx[len(finals)],
                mask,
                activation=rnn.activation,
                output_gate=rnn.output_gate,
                reverse=direction == 1,
            )
            outputs.append(states)
            finals.append(states[0 if direction else -1])
        h = torch.cat(outputs, 2)
    output, h_n = rnn(x, hx, mask)
    close(output, h)
    close(h_n, torch.stack(finals))


def test_batch_first_transposes():
    rnn = make(bidirectional=True)
    transposed = copy.deepcopy(rnn)
    transposed.batch_first = True
    x, hx, mask = torch.randn(6, 3, SIZE), make_state(rnn, 3), torch.rand(3, 6) < 0.4
    output, h_n = rnn(x, hx, mask)
    for contiguous in (False, True):
        y = x.transpose(0, 1)
        output_bf, h_n_bf = transposed(y.contiguous() if contiguous else y, hx, mask)
        close(output_bf.transpose(0, 1), output)
        close(h_n_bf, h_n)


@on_every_device
@every_variant
@pytest.mark.parametrize("kind", ["sorted", "unsorted"])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sentences_as_alone(device, options, kind, with_state):
    rnn = make(device, torch.float64, **options)
    lengths = sorted(LENGTHS, reverse=True) if kind == "sorted" else LENGTHS
    sentences = make_sentences(device, torch.float64, lengths)
    hx = make_state(rnn, len(lengths)) if with_state else None
    packed = pack_sequence(sentences, enforce_sorted=kind == "sorted")
    output, h_n = rnn(packed, hx)
    expected, expected_state = run_alone(rnn, sentences, hx)
    padded, _ = pad_packed_sequence(output)
    close(padded, pad_sequence(expected))
    close(h_n, expected_state)


@on_every_device
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masked_sentences_as_alone(device, side, batch_first):
    rnn = make(device, torch.float64, bidirectional=True)
    sentences = make_sentences(device, torch.float64)
    hx = make_state(rnn, len(sentences))
    steps = 8
    x = torch.full((steps, len(sentences), SIZE), 1e3, device=device, dtype=torch.float64)
    mask = torch.ones(len(sentences), steps, dtype=torch.bool, device=device)
    for lane, sentence in enumerate(sentences):
        length = len(sentence)
        places = {
            "left": torch.arange(steps - length, steps),
            "right": torch.arange(length),
            "anywhere": torch.randperm(steps)[:length].sort().values,
        }[side].to(device)
        x[places, lane] = sentence
        mask[lane, places] = False
    expected, expected_state = run_alone(rnn, sentences, hx)
    rnn.batch_first = batch_first
    output, h_n = rnn(x.transpose(0, 1) if batch_first else x, hx, mask)
    output = output.transpose(0, 1) if batch_first else output
    for lane, states in enumerate(expected):
        close(output[~mask[lane], lane], states)
    close(h_n, expected_state)


def test_output_repeats_the_state_over_padding():
    rnn = make(bidirectional=True)
    hx = make_state(rnn, 1)
    mask = torch.tensor([[True, False, True, False, True]])
    forward, backward = rnn(torch.randn(5, 1, SIZE), hx, mask)[0].chunk(2, 2)
    close(forward[[0, 2, 4]], torch.stack([hx[-2], forward[1], forward[3]]))
    close(backward[[0, 2, 4]], torch.stack([backward[1], backward[3], hx[-1]]))


def test_unbatched_is_a_batch_of_one():
    rnn = make(bidirectional=True)
    x, hx, mask = torch.randn(6, SIZE), make_state(rnn, 1), torch.rand(1, 6) < 0.5
    output, h_n = rnn(x, hx[:, 0], mask[0])
    expected, expected_state = rnn(x[:, None], hx, mask)
    close(output, expected[:, 0])
    close(h_n, expected_state[:, 0])


@pytest.mark.parametrize("with_state", [False, True])
def test_no_steps(with_state):
    rnn = make(bidirectional=True)
    hx = make_state(rnn, 3)
    output, h_n = rnn(torch.randn(0, 3, SIZE), hx if with_state else None)
    assert output.shape == (0, 3, 2 * HIDDEN)
    close(h_n, hx if with_state else torch.zeros_like(hx))
    assert h_n is not hx


def test_final_states_are_not_views_of_the_output():
    output, h_n = make()(torch.randn(6, 3, SIZE))
    before = output.detach().clone()
    h_n.detach().zero_()
    close(output.detach(), before)


# ---------------------------------------------------------------- properties

sizes = st.integers(1, 6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(VARIANTS), sizes, sizes, st.integers(0, 1000))
def test_padding_content_is_never_read(options, steps, batch, seed):
    torch.manual_seed(seed)
    rnn = make(dtype=torch.float64, **options)
    x = torch.randn(steps, batch, SIZE, dtype=torch.float64)
    mask = torch.rand(batch, steps) < 0.5
    # laid out as x is: with other strides a matrix product may round otherwise
    other = torch.where(mask.t().unsqueeze(2), torch.randn_like(x), x).contiguous()
    close(rnn(other, None, mask), rnn(x, None, mask), rtol=0, atol=0)


@on_every_device
@pytest.mark.parametrize(
    ("options", "form"),
    [(options, "steps first") for options in VARIANTS]
    + [({}, form) for form in ("batch first", "one sequence", "scripted", "compiled")],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@quiet_torchscript
def test_padding_content_has_no_gradient(device, options, form, value):
    """What is not finite at padding, or overflows, changes no output and no gradient; its own is zero."""
    rnn = make(device, batch_first=form == "batch first", **options)
    x, mask = torch.randn(6, 3, SIZE, device=device), torch.rand(3, 6, device=device) < 0.4
    mask[0, 1] = True
    if form == "one sequence":
        x, mask = x[:, 0], mask[0]
    padding = (mask.t() if form != "batch first" and mask.dim() > 1 else mask).unsqueeze(-1)
    run = {"scripted": torch.jit.script, "compiled": torch.compile}.get(form, lambda rnn: rnn)(rnn)
    results = []
    for content in (0.0, value):
        input = x.transpose(0, 1) if form == "batch first" else x
        input = input.masked_fill(padding, content).requires_grad_()
        output, h_n = run(input, None, mask)
        (output.square().sum() + h_n.sum()).backward()
        assert not input.grad.masked_select(padding).any()
        results.append([output, h_n, input.grad, *(p.grad for p in rnn.parameters())])
        rnn.zero_grad()
    close(*results)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([{}, {"layer_norm": True, "output_gate": True}]), sizes, sizes, st.integers(0, 1000))
def test_a_sequence_in_two_halves(options, first, second, seed):
    torch.manual_seed(seed)
    rnn = make(dtype=torch.float64, **options)
    x = torch.randn(first + second, 3, SIZE, dtype=torch.float64)
    mask = torch.rand(3, first + second) < 0.3
    output, h_n = rnn(x, None, mask)
    left, state = rnn(x[:first], None, mask[:, :first])
    right, state = rnn(x[first:], state, mask[:, first:])
    close(torch.cat([left, right]), output)
    close(state, h_n)


@settings(max_examples=30, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(0, 1000))
def test_batch_order_does_not_matter(lengths, random, seed):
    torch.manual_seed(seed)
    rnn = make(dtype=torch.float64, bidirectional=True)
    sentences = make_sentences(dtype=torch.float64, lengths=lengths)
    hx = make_state(rnn, len(lengths))
    order = list(range(len(lengths)))
    random.shuffle(order)
    output, h_n = rnn(pack_sequence(sentences, enforce_sorted=False), hx)
    shuffled = pack_sequence([sentences[lane] for lane in order], enforce_sorted=False)
    other, other_state = rnn(shuffled, hx[:, order])
    close(pad_packed_sequence(other)[0], pad_packed_sequence(output)[0][:, order])
    close(other_state, h_n[:, order])


# ---------------------------------------------------------------- training


@on_every_device
@every_variant
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_everything(device, options, packed):
    rnn = make(device, **options)
    hx = make_state(rnn, len(LENGTHS)).requires_grad_()
    sentences = [sentence.requires_grad_() for sentence in make_sentences(device)]
    if packed:
        output, h_n = rnn(pack_sequence(sentences, enforce_sorted=False), hx)
        output = output.data
    else:
        output, h_n = rnn(pad_sequence(sentences), hx)
    weights = torch.randn_like(output)
    ((output * weights).sum() + h_n.square().sum()).backward()
    for tensor in [hx, *sentences, *rnn.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@every_variant
def test_gradcheck(options):
    rnn = LRN(2, 2, 2, dtype=torch.float64, **options)
    names = [name for name, _ in rnn.named_parameters()]
    values = [torch.rand_like(p).sub_(0.5).requires_grad_() for p in rnn.parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = make_state(rnn, 2).requires_grad_()
    mask = torch.tensor([[False, True, False], [False, False, True]])

    def run(x, hx, *values):
        return torch.func.functional_call(rnn, dict(zip(names, values)), (x, hx, mask))

    assert torch.autograd.gradcheck(run, (x, hx, *values))


def test_dropout_acts_between_layers_and_in_training_only():
    x = torch.randn(20, 4, SIZE)
    rnn, plain = make(dropout=0.5), make()
    plain.load_state_dict(rnn.state_dict())
    close(rnn.eval()(x), plain(x))
    rnn.train()
    (output, h_n), (_, expected_state) = rnn(x), plain(x)
    close(h_n[0], expected_state[0])
    assert not torch.equal(h_n[1], expected_state[1])
    assert (output != 0).all()
    certain = LRN(SIZE, HIDDEN, 2, dropout=1.0)
    close(certain(x)[0], torch.zeros(20, 4, HIDDEN))


def tag_sentences(unit):
    """Somebody's program for nn.GRU: embed, encode a packed batch both ways, classify; returns the losses."""
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 8, padding_idx=0)
    encoder = unit(8, 16, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True)
    encoder.flatten_parameters()
    for name, parameter in encoder.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    classifier = nn.Linear(32, 2)
    parameters = [*embedding.parameters(), *encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    lengths = torch.randint(1, 9, (32,))
    tokens = torch.randint(1, 20, (32, 8)).masked_fill(torch.arange(8) >= lengths[:, None], 0)
    labels = (tokens == 7).any(1).long()
    losses = []
    for _ in range(30):
        packed = pack_padded_sequence(embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        output, h_n = encoder(packed)
        output, _ = pad_packed_sequence(output, batch_first=True)
        assert output.shape == (32, int(lengths.max()), 32)
        forward, backward = h_n.view(2, 2, 32, 16)[-1]
        loss = nn.functional.cross_entropy(classifier(torch.cat([forward, backward], 1)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("unit", [nn.GRU, LRN])
def test_a_program_for_gru_changes_one_name(unit):
    losses = tag_sentences(unit)
    assert losses[-1] < losses[0] / 2


# ---------------------------------------------------------------- what PyTorch does with modules


@quiet_torchscript
@on_every_device
@every_variant
def test_torchscript(device, options):
    rnn = make(device, **options)
    x, hx = torch.randn(6, 3, SIZE, device=device), make_state(rnn, 3)
    mask = torch.rand(3, 6, device=device) < 0.4
    scripted = torch.jit.script(rnn)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for module in (scripted, loaded):
        close(module(x), rnn(x))
        close(module(x, hx, mask), rnn(x, hx, mask))
        close(module(x[:, 0], hx[:, 0]), rnn(x[:, 0], hx[:, 0]))
        assert list(module.state_dict()) == list(rnn.state_dict())
    expected = copy.deepcopy(rnn).double()(x.double(), hx.double())
    close(loaded.double()(x.double(), hx.double()), expected)
    state = {name: torch.zeros_like(value) for name, value in rnn.state_dict().items()}
    loaded.load_state_dict(state)
    assert not loaded(x.double())[0].any()


@quiet_torchscript
def test_torchscript_inside_another_module():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = LRN(SIZE, HIDDEN, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output, h_n = self.rnn(x)
            return output.mean(0) + torch.cat([h_n[0], h_n[1]], 1)

    reader, x = Reader(), torch.randn(6, 3, SIZE)
    close(torch.jit.script(reader)(x), reader(x))


@quiet_torchscript
def test_traces_in_training():
    rnn, x = LRN(SIZE, HIDDEN, LAYERS, dropout=0.5), torch.randn(40, 3, SIZE)
    traced = torch.jit.trace(rnn, x, check_trace=False)
    output, h_n = traced(x)
    close(h_n[0], rnn(x)[1][0])
    assert not torch.equal(output, traced(x)[0])
    close(torch.jit.trace(rnn.eval(), x)(x), rnn(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:lrn_scan is not built for torch.func")
@every_variant
def test_other_derivatives(options):
    """Batches of gradients, torch.func and forward-mode AD give what backward() gives."""
    rnn, x = make(**options), torch.randn(3, 2, SIZE)
    jacobian = torch.autograd.functional.jacobian(lambda x: rnn(x)[0], x)
    close(torch.autograd.functional.jacobian(lambda x: rnn(x)[0], x, vectorize=True), jacobian)
    close(torch.func.jacfwd(lambda x: rnn(x)[0])(x), jacobian)
    close(torch.func.jacrev(lambda x: rnn(x)[0])(x), jacobian)
    loss = rnn(x)[0].square().sum()
    names = [name for name, _ in rnn.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(rnn.parameters()))))

    def function(parameters, x):
        return torch.func.functional_call(rnn, parameters, (x,))[0].square().sum()

    close(torch.func.grad(function)(dict(rnn.named_parameters()), x), expected)
    each = torch.func.vmap(torch.func.grad(function), (None, 1))(
        {name: p.detach() for name, p in rnn.named_parameters()}, x[:, :, None]
    )
    close({name: gradient.sum(0) for name, gradient in each.items()}, expected)


def test_compiles_to_one_graph():
    rnn = make(bidirectional=True, layer_norm=True, batch_first=True)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    x, mask = torch.randn(4, 4, SIZE, requires_grad=True), torch.rand(4, 4) < 0.4
    hx = make_state(rnn, 4).requires_grad_()
    for arguments in ((x,), (x, hx, mask)):
        gradients = []
        for module in (compiled, rnn):
            output, h_n = module(*arguments)
            loss = output.square().sum() + h_n.sum()
            gradients.append(torch.autograd.grad(loss, [x, *rnn.parameters()]))
        close(compiled(*arguments), rnn(*arguments))
        close(*gradients)


@pytest.mark.skipif(
    not hasattr(torch.ops.fairseq_lrn, "lrn_scan"),
    reason="the definition unrolls its steps",
)
def test_exports_with_dynamic_shapes():
    rnn = make(bidirectional=True)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    program = torch.export.export(
        rnn,
        (torch.randn(5, 3, SIZE), make_state(rnn, 3), torch.rand(3, 5) < 0.4),
        dynamic_shapes=({0: steps, 1: batch}, {1: batch}, {0: batch, 1: steps}),
    )
    arguments = (torch.randn(7, 4, SIZE), make_state(rnn, 4), torch.rand(4, 7) < 0.4)
    close(program.module()(*arguments), rnn(*arguments))


@on_every_device
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(device, packed):
    rnn = make(device, bidirectional=True, layer_norm=True)
    sentences = make_sentences(device)
    x = pack_sequence(sentences, enforce_sorted=False) if packed else pad_sequence(sentences)
    hx = make_state(rnn, len(sentences))
    with torch.autocast(device, torch.bfloat16):
        output, h_n = rnn(x, hx)
        _, again = rnn(x, h_n)
    assert h_n.dtype == again.dtype == torch.bfloat16
    expected, expected_state = rnn(x, hx)
    if packed:
        output, expected = output.data, expected.data
    assert output.dtype == torch.bfloat16
    close(output.float(), expected, rtol=0, atol=0.1)
    close(h_n.float(), expected_state, rtol=0, atol=0.1)
    (output.sum() + again.sum()).backward()
    assert rnn.weight_ih_l0.grad.dtype == torch.float32


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device, dtype):
    rnn = make(device, bidirectional=True, layer_norm=True)
    x = torch.randn(6, 3, SIZE, device=device)
    output, h_n = copy.deepcopy(rnn).to(dtype)(x.to(dtype))
    assert output.dtype == h_n.dtype == dtype
    close(output.float(), rnn(x)[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda rnn: pickle.loads(pickle.dumps(rnn))])
def test_copies(duplicate):
    rnn, x = make(bidirectional=True), torch.randn(6, 3, SIZE)
    close(duplicate(rnn)(x), rnn(x))


def test_state_dict_round_trip():
    rnn, x = make(bidirectional=True, layer_norm=True), torch.randn(6, 3, SIZE)
    other = LRN(SIZE, HIDDEN, LAYERS, bidirectional=True, layer_norm=True)
    assert not torch.equal(other(x)[0], rnn(x)[0])
    other.load_state_dict(rnn.state_dict())
    close(other(x), rnn(x))


def test_parametrized_weight():
    rnn, x = make(), torch.randn(6, 3, SIZE)
    expected = rnn(x)
    nn.utils.parametrizations.weight_norm(rnn, "weight_ih_l0")
    close(rnn(x), expected)
    with torch.no_grad():
        rnn.parametrizations.weight_ih_l0.original0.mul_(2)
    assert not torch.equal(rnn(x)[0], expected[0])
    before = rnn.weight_ih_l0.clone()
    rnn.reset_parameters()
    close(rnn.weight_ih_l0, before)


def test_reset_parameters_leaves_a_subclass_its_modules():
    class Normalised(LRN):
        def __init__(self):
            super().__init__(SIZE, HIDDEN)
            self.norm = nn.LayerNorm(HIDDEN)

    rnn = Normalised()
    rnn.reset_parameters()
    assert rnn.norm.weight.eq(1).all()


def test_packed_under_a_default_device():
    rnn, x = LRN(SIZE, HIDDEN, device="meta"), PACKED.to("meta")
    with torch.device("meta"):
        output, h_n = rnn(x)
    assert output.data.shape == (5, HIDDEN) and h_n.device.type == "meta"


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(
            (name, value)
            for name in ("input_size", "hidden_size", "num_layers")
            for value in (0, -1, 2.0, "2", True)
        ),
        *(("dropout", value) for value in (-0.1, 1.1, float("nan"), "0.5", True)),
        ("activation", "relu"),
    ],
)
def test_constructor_refuses(argument, value):
    arguments = {"input_size": 5, "hidden_size": 4, argument: value}
    with pytest.raises(ValueError, match=argument):
        LRN(**arguments)


BATCH, PACKED = torch.zeros(6, 3, SIZE), pack_sequence([torch.zeros(3, SIZE), torch.zeros(2, SIZE)])


@pytest.mark.parametrize(
    ("name", "input", "hx", "padding_mask"),
    [
        ("input", torch.zeros(SIZE), None, None),
        ("input", BATCH.to_sparse(), None, None),
        ("input", torch.nested.nested_tensor([BATCH[0]]), None, None),
        ("input", BATCH.to(torch.complex64), None, None),
        ("input", torch.quantize_per_tensor(BATCH, 1, 0, torch.quint8), None, None),
        ("hx", BATCH, torch.zeros(2, 3, HIDDEN).to_sparse(), None),
        ("padding_mask", BATCH, None, torch.zeros(3, 6, dtype=torch.bool).to_sparse()),
        ("padding_mask", BATCH, None, torch.zeros(3, 6, dtype=torch.bool, device="meta")),
        ("input", torch.zeros(6, 3, 1, SIZE), None, None),
        ("input", torch.zeros(6, 3, SIZE + 1), None, None),
        ("input", torch.zeros(6, SIZE + 1), None, None),
        ("input", pack_sequence([torch.zeros(3, SIZE + 1)]), None, None),
        ("input", pack_sequence([torch.zeros(3)]), None, None),
        ("input", BATCH.double(), None, None),
        ("input", BATCH.long(), None, None),
        ("input", BATCH.to("meta"), None, None),
        ("input", PACKED.to("meta"), None, None),
        ("hx", BATCH, torch.zeros(2, 3, HIDDEN, device="meta"), None),
        ("hx", BATCH, torch.zeros(2, HIDDEN), None),
        ("hx", BATCH, torch.zeros(2, 4, HIDDEN), None),
        ("hx", BATCH, torch.zeros(1, 3, HIDDEN), None),
        ("hx", BATCH, torch.zeros(2, 3, HIDDEN + 1), None),
        ("hx", BATCH, torch.zeros(2, 3, HIDDEN).double(), None),
        ("hx", BATCH[:, 0], torch.zeros(2, 1, HIDDEN), None),
        ("hx", PACKED, torch.zeros(2, 3, HIDDEN), None),
        ("padding_mask", PACKED, None, torch.zeros(2, 3, dtype=torch.bool)),
        ("padding_mask", BATCH, None, torch.zeros(6, 3, dtype=torch.bool)),
        ("padding_mask", BATCH, None, torch.zeros(6, dtype=torch.bool)),
        ("padding_mask", BATCH, None, torch.zeros(3, 6)),
        ("padding_mask", BATCH[:, 0], None, torch.zeros(3, 6, dtype=torch.bool)),
    ],
)
@quiet_torchscript
def test_forward_refuses(name, input, hx, padding_mask):
    rnn = LRN(SIZE, HIDDEN, LAYERS)
    with pytest.raises((TypeError, ValueError), match=f"^{name}\\b"):
        rnn(input, hx, padding_mask)
    if torch.is_tensor(input):
        with pytest.raises(torch.jit.Error, match=rf"Error: {name}\b"):
            scripted()(input, hx, padding_mask)


@functools.lru_cache
def scripted():
    return torch.jit.script(LRN(SIZE, HIDDEN, LAYERS))


@quiet_torchscript
def test_scripted_messages_name_dtypes():
    rnn = torch.jit.script(LRN(SIZE, HIDDEN, LAYERS))
    for arguments, words in (
        ((BATCH, None, torch.zeros(3, 6).int()), "padding_mask must be torch.bool, but is torch.int32"),
        ((BATCH.double(),), "input must be torch.float32 as the parameters are, got torch.float64"),
        ((BATCH, torch.zeros(2, 3, HIDDEN).half()), "hx must be torch.float32 .*got torch.float16"),
    ):
        with pytest.raises(torch.jit.Error, match=words):
            rnn(*arguments)


@pytest.mark.parametrize(
    "sizes", [[2, 2, 2], [1, 2, 2], [3, 1], [2, 2, 1, 0], [], [5, 1, -1], [[3, 2]]], ids=str
)
def test_malformed_packed_sequence(sizes):
    packed = PackedSequence(torch.zeros(5, SIZE), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(ValueError, match="input must have positive batch_sizes"):
        LRN(SIZE, HIDDEN)(packed)


@pytest.mark.parametrize("name", ["sorted_indices", "unsorted_indices"])
@pytest.mark.parametrize("indices", [[0, 1, 9], [0, 1], [1, 1, 2], [-1, 0, 1]], ids=str)
def test_packed_sequence_of_another_order(name, indices):
    """PyTorch's constructor checks none of the two."""
    order = {
        "sorted_indices": torch.arange(3),
        "unsorted_indices": torch.arange(3),
        name: torch.tensor(indices),
    }
    packed = PackedSequence(torch.zeros(5, SIZE), torch.tensor([3, 2]), **order)
    with pytest.raises(ValueError, match=f"input must have {name} with each number from 0 to 2 once"):
        LRN(SIZE, HIDDEN)(packed)
