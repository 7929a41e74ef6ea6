"""The recurrence against its definition, and what follows from the definition."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fairseq_lrn
from fairseq_lrn.ops import lrn_scan, lrn_scan_reference

PACKAGE = Path(fairseq_lrn.__file__).resolve().parent
# Largest ||result - definition|| / ||definition||, the definition in float64 on the same inputs.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DIRECTIONS = [{}, {"reverse": True}, {"bidirectional": True}]
OPTIONS = [
    {"activation": activation, "output_gate": gate, **direction}
    for activation, gate, direction in itertools.product(["tanh", "identity"], [False, True], DIRECTIONS)
]
MASKS = ["none", "left", "right", "anywhere", "row"]

fast = settings(deadline=None, max_examples=40)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


def make_mask(kind, steps, batch, generator=None):
    if kind == "none":
        return None
    lengths = torch.randint(0, steps + 1, (batch, 1), generator=generator)
    times = torch.arange(steps)
    if kind == "right":
        return times >= lengths
    if kind == "left":
        return times < lengths
    mask = torch.rand(batch, steps, generator=generator) < 0.3
    if kind == "row":
        mask[: (batch + 1) // 2] = True
    return mask


def make(steps, batch, size, options, mask="none", dtype=torch.float32, device="cpu", seed=0):
    """Projections, initial state, mask, and a gradient for the result."""
    generator = torch.Generator().manual_seed(seed)
    directions = 2 if options.get("bidirectional") else 1
    parts = 4 if options.get("output_gate") else 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    padding = make_mask(mask, steps, batch, generator)
    return (
        2 * normal(steps, batch, directions * parts * size),
        normal(batch, directions * size),
        padding if padding is None else padding.to(device),
        normal(steps, batch, directions * size),
    )


def run(scan, projections, state, mask, grad, options):
    """The result, and the gradients of projections and initial state."""
    projections = projections.detach().requires_grad_()
    state = None if state is None else state.detach().requires_grad_()
    output = scan(projections, state, mask, **options)
    inputs = [projections] if state is None else [projections, state]
    return [output.detach(), *torch.autograd.grad(output, inputs, grad, materialize_grads=True)]


def assert_close(results, expected, tolerance):
    assert len(results) == len(expected)
    for result, right in zip(results, expected):
        assert result.shape == right.shape
        right = right.double()
        error = (result.double() - right).norm()
        assert error.item() <= tolerance * max(1.0, right.norm().item())


def double(x):
    return x.double() if x is not None and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(options, dtype, device, instruction_set):
    for size, mask in zip([1, 7, 16, 70, 129], MASKS):
        projections, state, padding, grad = make(9, 4, size, options, mask, dtype, device)
        for initial in (None, state):
            inputs = (projections, initial, padding, grad)
            results = run(lrn_scan, *inputs, options)
            assert [x.dtype for x in results] == [dtype] * len(results)
            expected = run(lrn_scan_reference, *map(double, inputs), options)
            assert_close(results, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS[2::3], ids=str)
def test_every_kernel_of_a_gpu(options, dtype):
    """Each width of memory access, by as few lanes as it takes: many copies of 16 sentences.

    compute-sanitizer runs this test: the definition runs on the CPU, so that little else is launched.
    """
    inputs = make(19, 16, 64, options, "anywhere", dtype)
    expected = run(lrn_scan_reference, *map(double, inputs), options)
    projections, state, mask, grad = (x.cuda() for x in inputs)
    lanes = 96 * torch.cuda.get_device_properties(0).multi_processor_count
    widths = [width for width in (1, 2, 4, 8) if width * dtype.itemsize <= 16]
    for copies in [1, *(-(-lanes * width // (16 * 128)) for width in widths)]:
        many = [projections.repeat(1, copies, 1), state.repeat(copies, 1), mask.repeat(copies, 1)]
        results = run(lrn_scan, *many, grad.repeat(1, copies, 1), options)
        batches = [x.cpu().unflatten(-2, (copies, 16)).unbind(-3) for x in results]
        assert_close([x[0] for x in batches], expected, TOLERANCE[dtype])
        assert all(torch.equal(one, x[0]) for x in batches for one in x)


@pytest.mark.parametrize("gate", ["i", "f", "o"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_gate(dtype, gate, device, instruction_set):
    """Gates are what they should be, and their derivatives, from far below 0 to far above."""
    x = torch.linspace(-110, 110, 100_001, dtype=torch.float64).to(device, dtype)
    projections, state = torch.zeros(4, len(x)).to(x), torch.ones(1, len(x)).to(x)
    projections["fi o".index(gate)] = x
    projections[2] = 1
    inputs = (projections.view(1, 1, -1), state, None, torch.ones_like(state)[None])
    options = {"output_gate": True, "activation": "identity"}
    results = run(lrn_scan, *inputs, options)
    expected = run(lrn_scan_reference, *map(double, inputs), options)
    for result, right in zip(results, expected):
        torch.testing.assert_close(result.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, device):
    projections, state, padding, _ = make(4, 2, 2, options, "anywhere", torch.float64, device)
    projections.requires_grad_()
    state.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h: lrn_scan(x, h, padding, **options), (projections, state))


def test_double_backward_is_an_error(device):
    projections, state, _, grad = make(4, 2, 3, {}, device=device)
    if device.type != "cpu":
        pytest.skip("the definition can be differentiated twice")
    projections.requires_grad_()
    (first,) = torch.autograd.grad(lrn_scan(projections, state), projections, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="lrn_scan is differentiable only once by backward"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:lrn_scan is not built for torch.func")
def test_transforms():
    """torch.func and forward-mode AD give what the definition gives."""
    results = []
    for scan in (lrn_scan, lrn_scan_reference):
        projections, state, mask, _ = make(4, 2, 3, {}, "anywhere")

        def loss(projections, state, scan=scan, mask=mask):
            return scan(projections, state, mask).square().sum()

        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(projections, projections.cos())
            dual = torch.autograd.forward_ad.unpack_dual(scan(dual, state, mask)).tangent
        results.append(
            [
                torch.func.grad(loss, (0, 1))(projections, state),
                torch.func.vmap(lambda x, scan=scan: scan(x[:, None])[:, 0], 1, 1)(projections),
                torch.func.jvp(loss, (projections, state), (projections.cos(), state.cos())),
                torch.func.hessian(loss, 1)(projections, state),
                dual,
            ]
        )
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=str)
def test_batches_of_gradients(options):
    projections, state, mask, _ = make(3, 2, 2, options, "right")
    results = [
        torch.autograd.functional.jacobian(
            lambda x, h: lrn_scan(x, h, mask, **options), (projections, state), vectorize=vectorize
        )
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("byte", [1, 2, 255])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_byte_but_zero_is_true(byte, dtype, device, instruction_set):
    projections, state, mask, grad = make(9, 4, 40, {}, "anywhere", dtype, device)
    expected = run(lrn_scan, projections, state, mask, grad, {})
    mask = (mask.to(torch.uint8) * byte).view(torch.bool)
    assert all(map(torch.equal, run(lrn_scan, projections, state, mask, grad, {}), expected))


problems = st.fixed_dictionaries(
    {
        "steps": st.integers(0, 7),
        "batch": st.integers(0, 4),
        "size": st.sampled_from([1, 2, 15, 16, 33, 64, 65]),
        "options": st.sampled_from(OPTIONS),
        "mask": st.sampled_from(MASKS),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "seed": st.integers(0, 2**31),
    }
)


@fast
@given(problems)
def test_any_problem(problem):
    inputs = make(**problem)
    options = problem["options"]
    expected = run(lrn_scan_reference, *map(double, inputs), options)
    assert_close(run(lrn_scan, *inputs, options), expected, 2 * TOLERANCE[problem["dtype"]])


@fast
@given(problems, st.data())
def test_strides_do_not_matter(problem, data):
    def other_strides(x):
        if x is None:
            return None
        kind = data.draw(st.sampled_from(["transposed", "sliced", "stepped", "gaps", "odd ends", "same"]))
        if kind == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "sliced":
            return torch.cat([x, x, x], dim=-1)[..., x.size(-1) : 2 * x.size(-1)]
        if kind == "stepped":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if kind == "gaps":
            return x.repeat_interleave(3, dim=0)[1::3]
        if kind == "odd ends" and x.dim() > 1:  # what strides of axes of one element are is not said
            strides = [7 if n == 1 else stride for n, stride in zip(x.shape, x.stride())]
            return x.as_strided(x.shape, strides)
        return x

    inputs = make(**problem)
    options = problem["options"]
    results = run(lrn_scan, *map(other_strides, inputs), options)
    for result, expected in zip(results, run(lrn_scan, *inputs, options)):
        assert torch.equal(result, expected)


@fast
@given(problems)
def test_expanded_inputs(problem):
    projections, state, mask, grad = make(**{**problem, "batch": 1})
    options = problem["options"]
    mask = None if mask is None else mask.expand(3, -1)
    grad = grad[:1, :1].expand_as(grad).expand(-1, 3, -1)
    inputs = (projections.expand(-1, 3, -1), state.expand(3, -1), mask, grad)
    expected = run(lrn_scan, *(x if x is None else x.contiguous() for x in inputs), options)
    for result, right in zip(run(lrn_scan, *inputs, options), expected):
        assert torch.equal(result, right)


@fast
@given(problems, st.sampled_from(["left", "right", "anywhere"]))
def test_padding_never_changes_a_sentence(problem, kind):
    """Padded steps, whatever they hold, leave the other steps' states and gradients as they are."""
    projections, state, _, grad = make(**{**problem, "mask": "none"})
    steps, batch = projections.shape[:2]
    options = problem["options"]
    expected = run(lrn_scan, projections, state, None, grad, options)
    extra = problem["seed"] % 5
    place = torch.arange(steps)
    if kind == "left":
        place = place + extra
    elif kind == "anywhere":
        generator = torch.Generator().manual_seed(problem["seed"])
        place = torch.randperm(steps + extra, generator=generator)[:steps].sort().values
    mask = torch.ones(batch, steps + extra, dtype=torch.bool)
    mask[:, place] = False
    padded = torch.full((steps + extra, *projections.shape[1:]), float("nan"), dtype=projections.dtype)
    padded[place] = projections
    padded_grad = torch.zeros(steps + extra, *grad.shape[1:], dtype=grad.dtype)
    padded_grad[place] = grad
    output, grad_projections, grad_state = run(lrn_scan, padded, state, mask, padded_grad, options)
    results = [output[place], grad_projections[place], grad_state]
    for result, right in zip(results, expected):
        assert torch.equal(result, right)
    assert not grad_projections[mask.transpose(0, 1)].any()
    assert not output.isnan().any()


def test_the_definition_does_not_read_padding():
    projections, state, mask, grad = make(6, 4, 5, {}, "anywhere")
    padding = mask.t().unsqueeze(2)
    zeros, nans = (
        run(lrn_scan_reference, projections.masked_fill(padding, value), state, mask, grad, {})
        for value in (0.0, float("nan"))
    )
    assert padding.any() and all(torch.equal(a, b) for a, b in zip(nans, zeros))


@fast
@given(problems, st.integers(0, 7))
def test_a_sequence_in_two_halves(problem, cut):
    projections, state, mask, _ = make(**problem)
    options = {name: value for name, value in problem["options"].items() if name != "bidirectional"}
    if problem["options"].get("bidirectional"):
        projections, state = projections.chunk(2, dim=2)[1], state.chunk(2, dim=1)[0]
    whole = lrn_scan(projections, state, mask, **options)
    cut = min(cut, len(projections))
    parts = [(projections[:cut], None if mask is None else mask[:, :cut])]
    parts.append((projections[cut:], None if mask is None else mask[:, cut:]))
    if options.get("reverse"):
        parts.reverse()
    halves = []
    for part, part_mask in parts:
        halves.append(lrn_scan(part, state, part_mask, **options))
        if len(part):
            state = halves[-1][0 if options.get("reverse") else -1]
    if options.get("reverse"):
        halves.reverse()
    # Half types round the state that is carried over.
    assert_close([torch.cat(halves)], [whole], 2 * TOLERANCE[problem["dtype"]])


@fast
@given(problems)
def test_batch_order_does_not_matter(problem):
    projections, state, mask, grad = make(**problem)
    options = problem["options"]
    order = torch.randperm(len(state), generator=torch.Generator().manual_seed(problem["seed"]))
    shuffled = (projections[:, order], state[order], None if mask is None else mask[order], grad[:, order])
    results = run(lrn_scan, *shuffled, options)
    output, grad_projections, grad_state = run(lrn_scan, projections, state, mask, grad, options)
    assert torch.equal(results[0], output[:, order])
    assert torch.equal(results[1], grad_projections[:, order])
    assert torch.equal(results[2], grad_state[order])


@fast
@given(problems)
def test_bidirectional_is_two_calls(problem):
    options = {**problem["options"], "bidirectional": True}
    options.pop("reverse", None)
    projections, state, mask, grad = make(**{**problem, "options": options})
    results = run(lrn_scan, projections, state, mask, grad, options)
    del options["bidirectional"]
    singles = [
        run(lrn_scan, x, h, mask, g, {**options, "reverse": bool(direction)})
        for direction, (x, h, g) in enumerate(zip(*(x.chunk(2, dim=-1) for x in (projections, state, grad))))
    ]
    for result, parts in zip(results, zip(*singles)):
        assert torch.equal(result, torch.cat(parts, dim=-1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", range(4))
def test_not_finite(part, value, dtype, device, instruction_set):
    """What is not finite stays in its lane, and there is what the definition makes of it."""
    options = {"output_gate": True, "activation": "identity" if part % 2 else "tanh"}
    size, lane, time = 40, 21, 3
    projections, state, _, grad = make(6, 2, size, options, dtype=dtype, device=device)
    clean = run(lrn_scan, projections, state, None, grad, options)
    projections[time, 1, part * size + lane] = value
    results = run(lrn_scan, projections, state, None, grad, options)
    lanes = torch.zeros(2, size, dtype=torch.bool, device=device)
    lanes[1, lane] = True
    for result, before in zip(results, clean):
        here = lanes.repeat(1, result.size(-1) // size).expand_as(result)
        assert torch.equal(result[~here], before[~here])
    expected = lrn_scan_reference(projections, state, **options)
    assert torch.equal(results[0].isnan(), expected.isnan())
    assert torch.equal(results[0].isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_rounding(dtype, device, instruction_set):
    """Every number of a half type is read as it is, and states are rounded as PyTorch rounds."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    # q = -inf and k = inf: the state is v.
    infinite = torch.full_like(numbers, float("inf"))
    parts = torch.stack([-infinite, infinite, numbers])
    same = lrn_scan(parts.reshape(1, 1, -1), activation="identity").flatten()
    assert torch.equal(same.isnan(), numbers.isnan())
    assert torch.equal(same[~same.isnan()], numbers[~same.isnan()])
    # k = 0: the state is v / 2, which the smallest numbers cannot hold.
    parts[1] = 0
    halves = lrn_scan(parts.reshape(1, 1, -1), activation="identity").flatten()
    assert torch.equal(halves[~same.isnan()], (numbers.float() / 2).to(dtype)[~same.isnan()])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_empty(shape, options, device):
    projections, state, mask, grad = make(*shape, 5, options, "right", device=device)
    output, grad_projections, grad_state = run(lrn_scan, projections, state, mask, grad, options)
    assert output.shape == grad.shape
    assert grad_projections.shape == projections.shape
    assert torch.equal(grad_state, torch.zeros_like(state))


def test_threads_do_not_matter():
    inputs = make(40, 16, 200, {}, "anywhere")
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(lrn_scan, *inputs, {}))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_gradient_of_a_sum(device):
    """Its gradient is one number, expanded."""
    projections, _, _, grad = make(5, 3, 17, {}, device=device)
    projections.requires_grad_()
    lrn_scan(projections).sum().backward()
    (expected,) = torch.autograd.grad(lrn_scan(projections), projections, torch.ones_like(grad))
    assert torch.equal(projections.grad, expected)


X = torch.zeros(5, 2, 12)
H = torch.zeros(2, 4)
M = torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0],), {}, ValueError, "projections .*shape \\[2, 12\\]"),
        ((X[..., :11],), {}, ValueError, "projections .*multiple of 3 .*\\[5, 2, 11\\]"),
        ((X[..., :9],), {"output_gate": True}, ValueError, "projections .*multiple of 4 "),
        ((X[..., :9],), {"bidirectional": True}, ValueError, "projections .*multiple of 6 "),
        ((X.long(),), {}, TypeError, "projections .*torch.int64"),
        ((X.to(torch.complex64),), {}, TypeError, "projections .*torch.complex64"),
        ((X.to_sparse(),), {}, ValueError, "^projections must be strided"),
        ((torch.nested.nested_tensor([X[0]]),), {}, ValueError, "^projections must not be nested"),
        (
            (torch.quantize_per_tensor(X, 1, 0, torch.quint8),),
            {},
            TypeError,
            "projections .*(quint8|another dtype)",
        ),
        ((X, H.to_sparse()), {}, ValueError, "^initial_state must be strided"),
        ((X, H.to(torch.complex64)), {}, TypeError, "initial_state must be torch.float32 .*complex64"),
        ((X, H, M.to_sparse()), {}, ValueError, "^padding_mask must be strided"),
        ((X.to("meta"), H.double().to("meta")), {}, TypeError, "^initial_state must be torch.float32"),
        ((X, H[:1]), {}, ValueError, "initial_state .*\\[2, 4\\].*\\[1, 4\\]"),
        ((X, H[None]), {}, ValueError, "initial_state .*\\[1, 2, 4\\]"),
        ((X, H.double()), {}, TypeError, "initial_state must be torch.float32 .*torch.float64"),
        ((X, H.to("meta")), {}, ValueError, "initial_state .*cpu.*meta"),
        ((X, H, M.t()), {}, ValueError, "padding_mask .*\\[2, 5\\].*\\[5, 2\\]"),
        ((X, H, M.int()), {}, TypeError, "padding_mask must be torch.bool, but is torch.int32"),
        ((X, H, M.to("meta")), {}, ValueError, "padding_mask .*cpu.*meta"),
        ((X,), {"activation": "relu"}, ValueError, "activation .*'relu'"),
        ((X,), {"reverse": True, "bidirectional": True}, ValueError, "reverse .*bidirectional"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        lrn_scan(*arguments, **options)
    with pytest.raises(torch.jit.Error, match=message.replace("^", "")):
        scripted_scan(*arguments, **options)
    with torch.autocast("cpu", torch.bfloat16):
        if "initial_state must be torch.float32" not in message or arguments[0].is_meta:
            with pytest.raises(error, match=message):
                lrn_scan(*arguments, **options)


scripted_scan = torch.jit.script(lrn_scan)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X[0],), {}),
        ((X[..., :11],), {}),
        ((X.long(),), {}),
        ((X, H[:1]), {}),
        ((X, H.double()), {}),
        ((X, H, M[:1]), {}),
        ((X, H, M.int()), {}),
        ((X,), {"activation": "relu"}),
    ],
)
def test_bad_input_to_the_bare_operator(arguments, options):
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.fairseq_lrn.lrn_scan(*arguments, **options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    def layer(x, weight, state, mask):
        return lrn_scan(torch.nn.functional.linear(x, weight), state, mask).sum(dim=0)

    torch.manual_seed(0)
    inputs = [torch.randn(5, 2, 4), torch.randn(24, 4), torch.randn(2, 8)]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    mask = make_mask("right", 5, 2).to(device)
    expected = layer(*inputs, mask)
    result = torch.compile(layer, backend=backend, fullgraph=True)(*inputs, mask)
    gradients = [torch.autograd.grad(out, inputs, torch.ones_like(out)) for out in (result, expected)]
    assert_close([result, *gradients[0]], [expected, *gradients[1]], 1e-6)


def run_program(folder, program):
    """Run it where the only package of ours that can be found is the folder's; returns what it says."""
    (folder / "program.py").write_text(program)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return lrn_scan(self.linear(x), None, mask, bidirectional=True)


def test_torchscript_needs_only_the_library(tmp_path):
    """A saved program runs, gradients included, where there is none of our Python."""
    layer, x, mask = Layer(), torch.randn(5, 2, 4), make_mask("right", 5, 2)
    scripted = torch.jit.script(layer)
    output = layer(x, mask)
    assert torch.equal(scripted(x, mask), output)
    with pytest.raises(torch.jit.Error, match="padding_mask must have shape"):
        scripted(x, mask[:1])
    scripted.save(tmp_path / "layer.pt")
    output.sum().backward()
    torch.save((x, mask, output.detach(), layer.linear.weight.grad), tmp_path / "data.pt")
    (library,) = PACKAGE.glob("_C*.so")
    program = f"""
import sys, torch
torch.ops.load_library({str(library)!r})
layer = torch.jit.load("layer.pt")
x, mask, output, grad = torch.load("data.pt")
result = layer(x, mask)
result.sum().backward()
assert torch.equal(result, output) and torch.equal(layer.linear.weight.grad, grad)
assert not [name for name in sys.modules if name.startswith("fairseq")]
"""
    run_program(tmp_path, program)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    x = torch.randn(5, 2, 4, device=device)
    weight = torch.randn(12, 4, device=device, requires_grad=True)
    state = torch.randn(2, 4, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        projections = torch.nn.functional.linear(x, weight)
        output = lrn_scan(projections, state)
    assert output.dtype == projections.dtype == dtype
    output.float().sum().backward()
    assert weight.grad.dtype == state.grad.dtype == torch.float32
    assert torch.equal(output, lrn_scan(projections, state.to(dtype)))


def copy_without_library(folder):
    ignore = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fairseq_lrn", ignore=ignore)


def test_without_the_extension(tmp_path):
    """One warning that says how to build it; results, torch.compile and TorchScript as ever."""
    copy_without_library(tmp_path)
    program = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fairseq_lrn.ops import lrn_scan, lrn_scan_reference
    x, state, mask = torch.randn(5, 2, 24).requires_grad_(), torch.randn(2, 8), torch.rand(2, 5) < 0.5
    expected = lrn_scan_reference(x, state, mask, bidirectional=True, activation="identity")
def layer(x, state, mask):
    return lrn_scan(x, state, mask, bidirectional=True, activation="identity")
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
for scan in (layer, compiled, torch.jit.script(layer)):
    assert torch.allclose(scan(x, state, mask), expected)
messages = [str(warning.message) for warning in caught]
assert len(messages) == 1 and "python setup.py build_ext --inplace" in messages[0], messages
assert not hasattr(torch.ops.fairseq_lrn, "lrn_scan")
"""
    run_program(tmp_path, program)


def test_a_library_that_does_not_load(tmp_path):
    copy_without_library(tmp_path)
    (tmp_path / "fairseq_lrn" / "_C.abi3.so").write_bytes(b"not a library")
    program = "import torch\nfrom fairseq_lrn.ops import lrn_scan\nlrn_scan(torch.ones(1, 1, 3))"
    said = run_program(tmp_path, program)
    assert "does not load with PyTorch" in said
    assert "python setup.py build_ext --inplace" in said
