"""The CUDA kernels without a GPU: run thread by thread on the CPU, and the compiler's report on them.

With one, its gates too.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from batches import DEVICES
from torch.utils.cpp_extension import include_paths

from fairseq_lrn.ops import lrn_scan_reference

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "fairseq_lrn" / "csrc"
HARNESS = HERE / "lrn_cuda_harness.cpp"
# Largest ||result - definition|| / ||definition||, the definition in float64 on the same inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPTIONS = [
    {"activation": activation, "output_gate": gate, **direction}
    for activation, gate, direction in itertools.product(
        ["tanh", "identity"], [False, True], [{}, {"reverse": True}, {"bidirectional": True}]
    )
]
# Cards with few and with many multiprocessors for a problem: wide accesses, and one lane a thread.
SMALL_CARD, LARGE_CARD = 0, 1000


class Sequence(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "step_stride", "batch_stride")]

    @classmethod
    def of(cls, x):
        """Of a (steps, batch, width), (batch, width) or missing tensor."""
        return cls() if x is None else cls(x.data_ptr(), *([0] * (3 - x.dim())), *x.stride()[:-1])


class Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("steps", "batch", "directions", "size")]
    _fields_ += [(name, ctypes.c_bool) for name in ("reverse", "tanh", "gate")]

    @classmethod
    def of(cls, projections, activation="tanh", output_gate=False, reverse=False, bidirectional=False):
        directions = 2 if bidirectional else 1
        size = projections.size(2) // (directions * (4 if output_gate else 3))
        return cls(*projections.shape[:2], directions, size, reverse, activation == "tanh", output_gate)


class Forward(ctypes.Structure):
    _fields_ = [("problem", Problem)]
    _fields_ += [(name, Sequence) for name in ("projections", "initial_state", "mask", "output")]


class Backward(ctypes.Structure):
    _fields_ = [("problem", Problem)]
    _fields_ += [(name, Sequence) for name in ("projections", "initial_state", "mask", "output")]
    _fields_ += [(name, Sequence) for name in ("grad_output", "grad_projections", "grad_initial_state")]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    includes = [f"-I{HERE / 'shim'}", f"-I{KERNELS}", *(f"-isystem{path}" for path in include_paths())]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *options, *includes, str(HARNESS), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(kernel, dtype, args, multiprocessors):
    assert kernel(list(TOLERANCE).index(dtype), ctypes.byref(args), multiprocessors) == 0


def run(kernels, projections, state, mask, grad, options, card, empty=torch.empty):
    """The result and the gradients of projections and initial state, from memory full of NaN."""
    dtype = projections.dtype
    problem = Problem.of(projections, **options)
    mask = None if mask is None else mask.t()[..., None]
    inputs = [Sequence.of(x) for x in (projections, state, mask)]
    output, grad_projections = empty(grad.shape, dtype=dtype), empty(projections.shape, dtype=dtype)
    grad_state = torch.full((grad.size(1), grad.size(2)), float("nan"), dtype=dtype)
    output.fill_(float("nan"))
    grad_projections.fill_(float("nan"))
    call(kernels.forward, dtype, Forward(problem, *inputs, Sequence.of(output)), card)
    others = [Sequence.of(x) for x in (output, grad, grad_projections, grad_state)]
    call(kernels.backward, dtype, Backward(problem, *inputs, *others), card)
    return [output, grad_projections, grad_state]


def definition(projections, state, mask, grad, options):
    projections = projections.double().requires_grad_()
    state = torch.zeros(grad.shape[1:]) if state is None else state
    state = state.double().requires_grad_()
    output = lrn_scan_reference(projections, state, mask, **options)
    inputs = (projections, state)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.double(), materialize_grads=True)]


def make(steps, batch, size, options, dtype, masked=False, scale=2.0):
    """Projections, initial state, mask, and a gradient for the result."""
    generator = torch.Generator().manual_seed(steps + batch + size)
    directions = 2 if options.get("bidirectional") else 1
    parts = 4 if options.get("output_gate") else 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        scale * normal(steps, batch, directions * parts * size),
        normal(batch, directions * size),
        torch.rand(batch, steps, generator=generator) < 0.3 if masked else None,
        normal(steps, batch, directions * size),
    )


def assert_close(results, expected, tolerance):
    for result, right in zip(results, expected):
        assert result.shape == right.shape
        assert (result.double() - right).norm() <= tolerance * max(1.0, right.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition(kernels, options, dtype):
    sizes = [(1, 1, 1), (2, 3, 7), (5, 2, 8), (16, 1, 6), (17, 3, 16), (40, 2, 24), (3, 5, 33), (18, 2, 64)]
    for (steps, batch, size), masked in zip(sizes, itertools.cycle([True, False, True])):
        projections, state, mask, grad = make(steps, batch, size, options, dtype, masked)
        for initial, card in itertools.product([None, state], [SMALL_CARD, LARGE_CARD]):
            # Copies into the rings land as late as they may, or as early.
            kernels.copy_late(ctypes.c_bool(initial is None))
            inputs = (projections, initial, mask, grad, options)
            assert_close(run(kernels, *inputs, card), definition(*inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (3, 2, 0)])
def test_empty(kernels, shape, dtype):
    inputs = make(*shape, {}, dtype, masked=True)
    assert_close(run(kernels, *inputs, {}, SMALL_CARD), definition(*inputs, {}), 0)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-3]], ids=str)
def test_long(kernels, options):
    """Lanes are independent: one run of the definition serves all dtypes' inputs, side by side."""
    inputs = [make(4096, 1, 1, options, dtype, scale=1.0) for dtype in TOLERANCE]
    together = [torch.cat([x[i].double() for x in inputs], dim=0 if i == 1 else 1) for i in (0, 1, 3)]
    expected = definition(*together[:2], None, together[2], options)
    for number, (own, tolerance) in enumerate(zip(inputs, TOLERANCE.values())):
        right = [x.narrow(-2, number, 1) for x in expected]
        assert_close(run(kernels, *own, options, SMALL_CARD), right, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_and_alignment_do_not_matter(kernels, dtype):
    options = {"bidirectional": True}
    inputs = make(7, 3, 16, options, dtype, masked=True)
    expected = run(kernels, *inputs, options, SMALL_CARD)

    def shifted(x):
        wide = torch.full((*x.shape[:-1], x.size(-1) + 9), float("nan"), dtype=dtype)
        wide[..., 1:-8] = x
        return wide[..., 1:-8]

    def transposed(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x

    def spread(x):
        return x.repeat_interleave(3, dim=0)[1::3]

    for change in (shifted, transposed, spread):
        projections, state, mask, grad = inputs
        changed = (change(projections), change(state), spread(mask), change(grad))
        for card in (SMALL_CARD, LARGE_CARD):
            assert all(map(torch.equal, run(kernels, *changed, options, card), expected))


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_but_zero_is_true(kernels, byte):
    projections, state, mask, grad = make(11, 3, 16, {}, torch.float32, masked=True)
    other = (mask.to(torch.uint8) * byte).view(torch.bool)
    expected = run(kernels, projections, state, mask, grad, {}, SMALL_CARD)
    assert mask.any()
    for card in (SMALL_CARD, LARGE_CARD):
        found = run(kernels, projections, state, other, grad, {}, card)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("axis", [0, 1], ids=["steps", "batch"])
def test_strides_past_32_bits(kernels, axis, tmp_path):
    """Steps or sentences further apart than 2^31 elements, in files that hold little but gaps."""
    dtype, stride = torch.bfloat16, 2**31 + 8
    names = map(str, itertools.count())

    def far(shape, dtype=dtype):
        path, count = tmp_path / next(names), stride * (shape[axis] - 1) + shape[2]
        with open(path, "wb") as file:
            file.truncate(count * dtype.itemsize)
        memory = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        return memory.as_strided(shape, (stride, stride, 1))

    projections, state, _, grad = make(3 if axis == 0 else 1, 1 if axis == 0 else 3, 8, {}, dtype)
    expected = run(kernels, projections, state, None, grad, {}, SMALL_CARD)
    inputs = (far(projections.shape).copy_(projections), state, None, far(grad.shape).copy_(grad))
    results = run(kernels, *inputs, {}, SMALL_CARD, far)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(
    ("dtype", "sigmoid_error", "tanh_error"),
    [
        (torch.float32, lambda exact: 1e-5 * exact, lambda exact: 2e-6 * exact),
        (torch.bfloat16, lambda exact: 2.0**-12 + 1e-7, lambda exact: (2.0**-11 + 1e-7) * exact),
    ],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_gates(request, tmp_path, device, dtype, sigmoid_error, tanh_error):
    """Over all of float32; on the CPU with the instructions as wrong as their manual allows."""
    if device == "cpu":
        kernels = request.getfixturevalue("kernels")
    elif shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    else:
        library = tmp_path / "kernels.so"
        options = ["-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-x", "cu"]
        subprocess.run(["nvcc", *options, f"-I{KERNELS}", str(HARNESS), "-o", str(library)], check=True)
        kernels = ctypes.CDLL(str(library))
    bits = torch.arange(-(2**31), 2**31, 4099).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([bits.view(torch.float32), torch.linspace(-12, 12, 200001), special]).to(device)
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, sigmoid, tanh)]
    assert kernels.gates(list(TOLERANCE).index(dtype), *pointers, ctypes.c_int64(len(x))) == 0
    results = [(sigmoid, x.double().sigmoid(), sigmoid_error), (tanh, x.double().tanh(), tanh_error)]
    for result, exact, error in results:
        assert torch.equal(result.isnan(), exact.isnan())
        number = ~exact.isnan()
        off = (result.double() - exact)[number].abs()
        # The hardware flushes what is below 2^-126 to zero.
        assert (off <= error(exact[number].abs()) + 2.0**-125).all()


def test_compilers_report(tmp_path):
    """Everything a kernel holds is in registers, on each architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    architectures = ("sm_80", "sm_90")
    options = ["-std=c++17", "-Xptxas", "-v", "-fatbin", "-x", "cu"]
    options += [f"-gencode=arch=compute_80,code={architecture}" for architecture in architectures]
    done = subprocess.run(
        ["nvcc", *options, f"-I{KERNELS}", str(HARNESS), "-o", str(tmp_path / "kernels.fatbin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    report = re.findall(
        r"for '(sm_\d+)'\n.*\n *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        done.stdout,
    )
    # Two passes, activations and output gates, and access widths from one element to 16 bytes; the gates.
    kernels = 8 * (3 + 2 + 4 + 4) + 2
    assert sorted(report) == [(name, "0", "0", "0") for name in architectures for _ in range(kernels)]
    assert "warning" not in done.stdout
