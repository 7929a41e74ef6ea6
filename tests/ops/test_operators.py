"""What holds for every operator: PyTorch's own check of it, and one check of arguments for all devices."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fairseq_lrn
from fairseq_lrn.modules import LRN
from fairseq_lrn.ops import linear, log_softmax_topk, lrn_scan

PACKAGE = Path(fairseq_lrn.__file__).resolve().parent
OPERATORS = torch.ops.fairseq_lrn
pytestmark = pytest.mark.skipif(not hasattr(OPERATORS, "lrn_scan"), reason="the operators are not compiled")


def normal(*shape, grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(grad)


def scan_samples():
    mask = torch.tensor([[False, True, False], [False] * 3])
    both = {"activation": "identity", "output_gate": True, "bidirectional": True}
    for grad in (False, True):
        yield (normal(3, 2, 15, grad=grad),), {}
        yield (normal(3, 2, 40, grad=grad), normal(2, 10, grad=grad), mask), both


def scan_backward_samples():
    for (projections, *others), options in list(scan_samples())[:2]:
        initial_state, mask = others or (None, None)
        output = OPERATORS.lrn_scan(projections, *others, **options)
        defaults = {"activation": "tanh", "output_gate": False, "reverse": False, "bidirectional": False}
        grad = torch.ones_like(output)
        yield (grad, projections, output, initial_state, mask), {**defaults, **options}


def linear_samples():
    for rows in (3, 40):
        yield (normal(rows, 5), normal(4, 5), normal(4)), {}
        yield (normal(2, rows, 5, grad=True), normal(4, 5, grad=True), normal(4, grad=True)), {}
    yield (normal(2, 40, 5, grad=True), normal(4, 5)), {}


def attention_samples():
    mask = torch.tensor([[False, True, False], [False] * 3])
    for grad in (False, True):
        yield (normal(4, 2, 6, grad=grad), normal(2, 2, 2, 3, 3, grad=grad)), {}
        yield (normal(4, 6, 6, grad=grad), normal(2, 2, 2, 3, 3, grad=grad), mask), {}


def attention_backward_samples():
    for (query, *others), _ in list(attention_samples())[:2]:
        yield (torch.ones_like(query), query, *others, *[None] * (2 - len(others))), {}


# Every operator but those without tensors; a new one must be added here.
SAMPLES = {
    "attention": attention_samples,
    "attention_backward": attention_backward_samples,
    "cross_entropy_": lambda: [((normal(3, 70), torch.tensor([0, 9, 5]), 0.1), {})],
    "dropout": lambda: [((normal(3, 70, grad=grad), 0.3, 5), {}) for grad in (False, True)],
    "linear": linear_samples,
    "log_softmax_topk": lambda: [((normal(3, 70), 4, [1]), {})],
    "lrn_scan": scan_samples,
    "lrn_scan_backward": scan_backward_samples,
}
WITHOUT_TENSORS = {"cpu_capability", "set_cpu_capability"}


def registered():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    return {name for namespace, name in names if namespace == "fairseq_lrn"}


def test_every_operator_has_samples():
    assert registered() == {*SAMPLES, *WITHOUT_TENSORS}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    for arguments, options in SAMPLES[name]():
        torch.library.opcheck(getattr(OPERATORS, name), arguments, options)


def change(value, at, function):
    """``value``, a nest of lists and tuples of tensors, with ``function`` of its tensor number ``at``."""
    number = 0

    def walk(value):
        nonlocal number
        if isinstance(value, (list, tuple)):
            return type(value)(map(walk, value))
        if torch.is_tensor(value):
            number += 1
            return function(value) if at is None or number - 1 == at else value
        return value

    result = walk(value)
    return result, number


def outcome(call, arguments, options):
    """The results' shapes and dtypes, or nothing if the call is refused."""
    try:
        results = call(*arguments, **options)
    except (RuntimeError, NotImplementedError):
        return None
    return [(x.shape, x.dtype) for x in (results if isinstance(results, tuple) else (results,))]


CHANGES = {
    "axis": lambda x: x[None],
    "rows": lambda x: x[:-1],
    "columns": lambda x: x[..., :-1],
    "double": lambda x: x.double(),
    "integer": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SAMPLES)
def test_devices_have_one_check(name):
    """What the CPU refuses, tracing refuses, and what it takes has the same shapes and dtypes there."""
    call = getattr(OPERATORS, name)
    for arguments, options in SAMPLES[name]():
        arguments, number = change(arguments, None, torch.Tensor.detach)
        refused = 0
        for at in range(number):
            for function in CHANGES.values():
                changed, _ = change(arguments, at, function)
                found = outcome(call, changed, options)
                on_meta, _ = change(changed, None, lambda x: x.to("meta"))
                assert outcome(call, on_meta, options) == found
                refused += found is None
            if number > 1:
                mixed, _ = change(arguments, at, lambda x: x.to("meta"))
                assert outcome(call, mixed, options) is None
        assert refused > 0


def test_make_fx():
    rnn = LRN(5, 4, 2, bidirectional=True)
    x, mask = normal(40, 2, 5), torch.rand(2, 40) < 0.4
    weights = dict(rnn.named_parameters())

    def function(weights, x, mask):
        return torch.func.functional_call(rnn, weights, (x, None, mask))[0]

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(weights, x, mask)
        torch.testing.assert_close(graph(weights, x, mask), rnn(x, None, mask)[0])
        assert "fairseq_lrn.lrn_scan.default" in {str(node.target) for node in graph.graph.nodes}


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rnn = LRN(5, 4, 2, dropout=0.5)
        output, h_n = rnn(torch.randn(40, 2, 5), None, torch.zeros(2, 40, dtype=torch.bool))
        output.sum().backward()
        values, _ = log_softmax_topk(torch.randn(3, 9), 2)
    assert output.shape == (40, 2, 4) and h_n.shape == (2, 2, 4) and values.shape == (3, 2)
    assert rnn.weight_ih_l0.grad.shape == rnn.weight_ih_l0.shape


def saved_by(function):
    """The result, and the bytes that it keeps for the backward pass."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return function(), sum(storages.values())


def test_saves_what_a_gradient_needs():
    x, weight, bias = normal(40, 5), normal(4, 5), normal(4)
    input_size, weight_size = (4 * tensor.numel() for tensor in (x, weight))
    for needed, size in (
        ((), 0),
        ((bias,), 0),
        ((x,), weight_size),
        ((weight,), input_size),
        ((x, weight, bias), input_size + weight_size),
    ):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is other for other in needed))
        result, saved = saved_by(lambda: linear(x, weight, bias))
        assert saved == size
        if needed:
            gradients = torch.autograd.grad(result.sum(), needed)
            expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).sum(), needed)
            torch.testing.assert_close(gradients, expected)
    assert saved_by(lambda: lrn_scan(normal(3, 2, 12)))[1] == 0


def test_a_frozen_layer_lets_its_input_change():
    rnn, x = LRN(5, 4), normal(40, 2, 5)
    rnn.weight_ih_l0.requires_grad_(False)
    output, _ = rnn(x)
    x.zero_()
    output.sum().backward()
    assert rnn.bias_ih_l0.grad.abs().sum() > 0


def test_changes_in_place_are_errors():
    """PyTorch's own, where the backward pass would read what is no longer there."""
    changed = "modified by an inplace operation"
    projections = normal(3, 2, 12, grad=True)
    output = lrn_scan(projections)
    output.mul_(2)
    with pytest.raises(RuntimeError, match=changed):
        output.sum().backward()
    x, weight = normal(40, 5), normal(4, 5, grad=True)
    output = linear(x, weight)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=changed):
        output.sum().backward()


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = normal(6, 7, 5, grad=True), normal(4, 5, grad=True), normal(4)
    counts = []
    for function in (linear, torch.nn.functional.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 6 * 7 * 5 * 4] * 2
    for parts, options, operations in (
        (3, {}, 8),
        (3, {"activation": "identity"}, 7),
        (8, {"output_gate": True, "bidirectional": True}, 2 * 11),
    ):
        with FlopCounterMode(display=False) as counter:
            lrn_scan(normal(6, 7, parts * 5, grad=True), **options).sum().backward()
        assert counter.get_total_flops() == 3 * operations * 6 * 7 * 5


def run_program(program, *words, **env):
    """Run it where no package of ours is found; returns its exit status and what it says."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=PACKAGE.parent,
        env={**inherited, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_second_copy_is_refused(tmp_path):
    """By the package with an error; loaded by hand it is left out, and the first one goes on."""
    (library,) = PACKAGE.glob("_C*.so")
    second = shutil.copy(library, tmp_path)
    by_hand = """
import sys, torch
from fairseq_lrn.ops import lrn_scan
torch.ops.load_library(sys.argv[1])
print(lrn_scan(torch.zeros(2, 1, 3)).shape)
"""
    status, said = run_program(by_hand, second)
    assert status == 0 and "torch.Size([2, 1, 1])" in said
    assert said.count("Another copy of fairseq_lrn's operators is loaded already") == 1
    package = "import sys, torch\ntorch.ops.load_library(sys.argv[1])\nimport fairseq_lrn.ops"
    status, said = run_program(package, second)
    assert status == 1
    assert said.splitlines()[-1].startswith(f"ImportError: {library} cannot be loaded, because another copy")
    assert run_program(package, library) == (0, "")
    # as fairseq imports a --user-dir that is a link of another name
    (tmp_path / "another").symlink_to(PACKAGE)
    twice = "import sys, fairseq_lrn.ops\nsys.path.append(sys.argv[1])\nimport another.ops"
    assert run_program(twice, tmp_path) == (0, "")


def test_instruction_set():
    """It is chosen by name, at first from the environment; what is unknown or not there is an error."""
    known = "must be one of default.* on this machine, but is 'sse'"
    with pytest.raises(ValueError, match=f"name {known}"):
        OPERATORS.set_cpu_capability("sse")
    for name, expected in (("default", "default"), ("", OPERATORS.cpu_capability())):
        program = "import torch, fairseq_lrn.ops\nprint(torch.ops.fairseq_lrn.cpu_capability())"
        assert run_program(program, FAIRSEQ_LRN_CPU_CAPABILITY=name) == (0, f"{expected}\n")
    status, said = run_program("import fairseq_lrn.ops", FAIRSEQ_LRN_CPU_CAPABILITY="sse")
    assert status == 1
    assert re.fullmatch(f"ValueError: FAIRSEQ_LRN_CPU_CAPABILITY {known}", said.splitlines()[-1])
