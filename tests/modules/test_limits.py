"""LRN in programs written for nn.GRU: what they use, and the limits that README.md lists."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fairseq_lrn.modules import LRN
from fairseq_lrn.ops import lrn_scan_reference

README = Path(__file__).resolve().parents[2] / "README.md"
close = torch.testing.assert_close
needs_operator = pytest.mark.skipif(
    not hasattr(torch.ops.fairseq_lrn, "lrn_scan"), reason="without it the definition runs, unrolled"
)


class Reference(nn.Module):
    """What LRN(4, 6) computes, by the definition, with LRN's own parameters."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        output = lrn_scan_reference(nn.functional.linear(x, self.rnn.weight_ih_l0, self.rnn.bias_ih_l0))
        return output, output[-1:]


@pytest.fixture
def rnn():
    torch.manual_seed(0)
    return LRN(4, 6, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- README.md's table

LIMITS = {}  # the name of a row: its program; a row that says "error" names the exception that it raises


def limit(name):
    def register(program):
        LIMITS[name] = program
        return program

    return register


def rows():
    """Name and text of each row of the table in README.md's section Limits."""
    section = README.read_text(encoding="utf-8").split("\n## Limits\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.M))


@limit("double backward: `backward()` of a gradient")
def double_backward(rnn, x):
    def penalty(module):
        (gradient,) = torch.autograd.grad(module(y)[0].sin().sum(), y, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), y)[0]

    y = x.requires_grad_()
    close(penalty(rnn), penalty(Reference(rnn)))


@limit("`torch.func.grad`, `vmap`, `jacrev`, `hessian`")
def transforms(rnn, x):
    weights = {name: parameter.detach() for name, parameter in rnn.named_parameters()}
    found = []
    for module, prefix in ((rnn, ""), (Reference(rnn), "rnn.")):

        def loss(weight, y, module=module, prefix=prefix):
            values = {prefix + "weight_ih_l0": weight, prefix + "bias_ih_l0": weights["bias_ih_l0"]}
            return torch.func.functional_call(module, values, (y,))[0].sin().sum()

        weight = weights["weight_ih_l0"]
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weight, x.unsqueeze(2))
        found.append((torch.func.grad(loss)(weight, x), each, torch.func.jacrev(loss)(weight, x)))
        found[-1] += (torch.func.hessian(loss)(weight, x[:2, :1]),)
    close(*found)


@limit("forward-mode AD: `torch.func.jvp`, `forward_ad`")
def forward_mode(rnn, x):
    def tangents(module):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent
        return tangent, torch.func.jvp(lambda y: module(y)[0], (x,), (direction,))[1]

    direction = torch.randn_like(x)
    close(tangents(rnn), tangents(Reference(rnn)))


@limit("changing the output in place before `backward()`")
def change_in_place(rnn, x):
    rnn(x)[0].mul_(2).sum().backward()


@limit("`torch.onnx.export`")
def export_to_onnx(rnn, x):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = LRN(4, 6, 2, bidirectional=True)
    for dynamo in (False, True):
        file, options = io.BytesIO(), {"verbose": False} if dynamo else {"input_names": ["input"]}
        program = torch.onnx.export(model, (x.float(),), None if dynamo else file, dynamo=dynamo, **options)
        if dynamo:
            program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue())
        output, h_n = session.run(None, {"input": x.float().numpy()})
        close((torch.tensor(output), torch.tensor(h_n)), model(x.float()), rtol=1e-4, atol=1e-5)


@limit("`torch.fx.symbolic_trace` of a model that holds it")
def trace_with_fx(rnn, x):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.projection = rnn, nn.Linear(6, 2, dtype=torch.float64)

        def forward(self, x):
            output, h_n = self.rnn(x)
            return self.projection(output), h_n

    reader = Reader()
    traced = torch.fx.symbolic_trace(reader)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["rnn", "projection"]
    close(traced(x), reader(x))
    close(traced(x[:2, :1]), reader(x[:2, :1]))
    with pytest.raises(TypeError, match="not LRN by itself"):
        torch.fx.symbolic_trace(rnn)


@limit("`isinstance(rnn, nn.RNNBase)`")
def is_an_rnn(rnn, x):
    assert not isinstance(rnn, nn.RNNBase)


@limit("`weight_hh_l0`, `bias_hh_l0`, `weight_ih_l0_reverse`")
def recurrent_weights(rnn, x):
    for name in ("bias_hh_l0", "weight_ih_l0_reverse"):
        assert not hasattr(rnn, name)
    _ = rnn.weight_hh_l0


@limit("`_flat_weights`: reading it")
def read_flat_weights(rnn, x):
    assert [id(weight) for weight in rnn._flat_weights] == [id(weight) for weight in rnn.parameters()]


@limit("`_flat_weights`: setting it")
def set_flat_weights(rnn, x):
    rnn._flat_weights = [torch.zeros_like(weight) for weight in rnn._flat_weights]


@limit("`proj_size=`, `nonlinearity=`")
def other_arguments(rnn, x):
    with pytest.raises(TypeError, match="nonlinearity"):
        LRN(4, 6, nonlinearity="relu")
    LRN(4, 6, proj_size=3)


@limit("`nn.LSTM`'s pair of states")
def pair_of_states(rnn, x):
    state = torch.zeros(1, 3, 6, dtype=torch.float64)
    rnn(x, (state, state))


@limit("`quantize_dynamic`")
def quantize(rnn, x):
    model = nn.Sequential(rnn.float())
    for kinds in (None, {nn.Linear}, {nn.GRU}, {LRN}):
        quantized = torch.ao.quantization.quantize_dynamic(model, kinds)
        assert type(quantized[0]) is LRN
        close(quantized(x.float()), model(x.float()), rtol=0, atol=0)


@needs_operator
@pytest.mark.parametrize("name", LIMITS, ids=[program.__name__ for program in LIMITS.values()])
@pytest.mark.filterwarnings("ignore")
def test_limit(name, rnn, x):
    error = re.search(r"`(\w+Error)`", rows()[name])
    if error is None:
        LIMITS[name](rnn, x)
    else:
        with pytest.raises((AttributeError, TypeError, RuntimeError)) as raised:
            LIMITS[name](rnn, x)
        assert error[1] in [kind.__name__ for kind in type(raised.value).__mro__]


def test_readme_lists_these():
    assert rows().keys() - {"in a program for `nn.GRU`", "|---|---|"} == LIMITS.keys()


# ---------------------------------------------------------------- what else PyTorch does with an nn.GRU


def gradients(rnn, output):
    return torch.autograd.grad(output.sin().sum(), [p for p in rnn.parameters() if p.requires_grad])


@pytest.mark.parametrize("normalise", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm")
def test_spectral_norm(normalise, rnn, x):
    normalise(rnn, "weight_ih_l0", n_power_iterations=50)
    output = rnn(x)[0]
    close(torch.linalg.matrix_norm(rnn.weight_ih_l0, 2), torch.ones((), dtype=torch.float64))
    close(output, Reference(rnn)(x)[0])
    assert all(gradient.any() for gradient in gradients(rnn, output))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_norm_as_a_hook(rnn, x):
    before = rnn(x)
    nn.utils.weight_norm(rnn, "weight_ih_l0")
    close(rnn(x), before)
    with torch.no_grad():
        rnn.weight_ih_l0_g.mul_(2)
    output = rnn(x)[0]
    close(output, Reference(rnn)(x)[0])
    assert not torch.equal(output, before[0])
    assert all(gradient.any() for gradient in gradients(rnn, output))


def test_pruning(rnn, x):
    prune.l1_unstructured(rnn, "weight_ih_l0", 0.5)
    assert rnn.weight_ih_l0.eq(0).sum() == 36
    output = rnn(x)[0]
    close(output, Reference(rnn)(x)[0])
    pruned = torch.autograd.grad(output.sum(), rnn.weight_ih_l0_orig)[0]
    assert pruned.any() and not pruned[rnn.weight_ih_l0_mask == 0].any()


def test_weight_drop(rnn, x):
    """As AWD-LSTM's: a parameter under another name, and each time a plain tensor in its place."""
    raw = nn.Parameter(rnn.weight_ih_l0.detach())
    del rnn._parameters["weight_ih_l0"]
    rnn.register_parameter("weight_ih_l0_raw", raw)
    rnn.weight_ih_l0 = nn.functional.dropout(raw, 0.5)
    output = rnn(x)[0]
    close(output, Reference(rnn)(x)[0])
    assert torch.autograd.grad(output.sum(), raw)[0].any()


def test_functional_call_and_data_parallel(rnn, x):
    other = LRN(4, 6, dtype=torch.float64)
    close(torch.func.functional_call(rnn, dict(other.named_parameters()), (x,)), other(x))
    replica = rnn._replicate_for_data_parallel()
    for name, parameter in other.named_parameters():
        setattr(replica, name, parameter * 1)  # as nn.DataParallel gives each device its copies
    close(replica(x), other(x))


def test_loading(rnn, x):
    state = copy.deepcopy(rnn.state_dict())
    other = LRN(4, 6, device="meta", dtype=torch.float64)
    other.load_state_dict(state, assign=True)
    close(other(x), rnn(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*bias_ih_l0"):
        rnn.load_state_dict({"weight_ih_l0": state["weight_ih_l0"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_hh_l0"):
        rnn.load_state_dict({**state, "weight_hh_l0": torch.zeros(18, 6)})
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        rnn.load_state_dict(nn.GRU(5, 6).state_dict(), strict=False)


def test_without_memory_at_first():
    """Made on the meta device, or by skip_init, and initialised from the same seed: the same weights."""
    torch.manual_seed(0)
    expected = LRN(4, 6, 2).state_dict()
    for rnn in (LRN(4, 6, 2, device="meta").to_empty(device="cpu"), nn.utils.skip_init(LRN, 4, 6, 2)):
        torch.manual_seed(0)
        rnn.reset_parameters()
        close(rnn.state_dict(), expected, rtol=0, atol=0)
    output, h_n = LRN(4, 6, 2).to("meta")(torch.empty(5, 3, 4, device="meta"))
    assert output.device.type == h_n.device.type == "meta" and output.shape == (5, 3, 6)


def test_initialisers_that_look_for_names():
    def initialise(module):
        if isinstance(module, LRN):
            for name, parameter in module.named_parameters():
                if "weight_ih" in name:
                    nn.init.constant_(parameter, 0.1)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(parameter)
                elif "bias" in name:
                    nn.init.constant_(parameter, 0.2)

    state = nn.Sequential(LRN(4, 6, 2)).apply(initialise).state_dict()
    for name, value in state.items():
        close(value, torch.full_like(value, 0.1 if "weight" in name else 0.2))


def test_hooks(rnn, x):
    seen = []
    rnn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    rnn.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 3, outputs[1]))
    rnn.register_full_backward_pre_hook(lambda module, grads: seen.append(("before", *grads)))
    rnn.register_full_backward_hook(lambda module, inputs, outputs: seen.append(("after", *inputs)))
    y = x.requires_grad_()
    output, h_n = rnn(y)
    close((output, h_n), (3 * Reference(rnn)(2 * x)[0], Reference(rnn)(2 * x)[1]))
    output.sum().backward()
    assert [name for name, *_ in seen] == ["before", "after"]
    close(2 * seen[1][1], y.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(reentrant, x):
    rnn, y = LRN(4, 6, 2, dropout=0.5, dtype=torch.float64), x.requires_grad_()
    found = []
    for run in (rnn, lambda y: checkpoint(rnn, y, use_reentrant=reentrant)):
        torch.manual_seed(0)
        rnn.zero_grad()
        run(y)[0].sum().backward()
        found.append([parameter.grad for parameter in rnn.parameters()])
    close(*found)


def test_saved_tensors_elsewhere(rnn, x):
    expected = gradients(rnn, rnn(x)[0])
    with torch.autograd.graph.save_on_cpu():
        output = rnn(x)[0]
    close(gradients(rnn, output), expected)


def test_shared_memory_and_inference_mode(rnn, x):
    expected = rnn(x)
    assert rnn.share_memory().weight_ih_l0.is_shared()
    with torch.inference_mode():
        close(rnn(x), expected)


@needs_operator
def test_compiles_for_every_length_at_once(rnn):
    graphs = []
    compiled = torch.compile(
        rnn, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for steps in (5, 2, 4):
        x = torch.randn(steps, 3, 4, dtype=torch.float64)
        close(compiled(x), rnn(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("value", [[1.0], "x"])
def test_refuses_what_is_no_tensor(value, rnn, x):
    for name, arguments in (("input", (value,)), ("hx", (x, value)), ("padding_mask", (x, None, value))):
        with pytest.raises(TypeError, match=f"^{name} must be a Tensor"):
            rnn(*arguments)
