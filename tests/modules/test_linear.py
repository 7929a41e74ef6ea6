"""Where a linear layer is computed by the operator, and where it is called."""

import pytest
import torch
import torch.nn as nn
from torch.nn.modules import module as modules

from fairseq_lrn.modules.linear import project


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Linear(3, 4, bias=False)])
def test_a_plain_layer(layer):
    x = torch.randn(40, 3)
    torch.testing.assert_close(project(layer, x), nn.Linear.forward(layer, x))
    assert project(layer, x).grad_fn.name() != nn.Linear.forward(layer, x).grad_fn.name()


@pytest.mark.parametrize("layer", [Adapter(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Tanh())])
def test_whatever_stands_in_its_place_is_called(layer):
    x = torch.randn(40, 3)
    assert torch.equal(project(layer, x), layer(x))


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook"]
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_run(register, everywhere):
    layer, calls = nn.Linear(3, 4), []
    owner = modules if everywhere else layer
    name = register.replace("register", "register_module") if everywhere else register
    handle = getattr(owner, name)(lambda *_: calls.append(1))
    try:
        project(layer, torch.randn(40, 3, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert calls == [1]


def test_torch_fx_sees_the_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return project(self.layer, x)

    model, x = Model(), torch.randn(40, 3)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(graph(x), model(x))
