"""A decoder layer's step in one operator, against the layer's own definition."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lrn.models.lrn import LRNConfig
from fairseq_lrn.models.lrn_layers import LRNDecoderLayer

# sentences and their hypotheses: up to eight rows have a kernel each, more have the BLAS
ROWS = [(1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (3, 2), (1, 7), (2, 4), (3, 3), (70, 1)]


def build(heads=2, head_dim=4, ffn_embed_dim=12, seed=0, **options):
    torch.manual_seed(seed)
    cfg = LRNConfig(
        encoder_embed_dim=6,
        decoder_embed_dim=heads * head_dim,
        decoder_ffn_embed_dim=ffn_embed_dim,
        decoder_attention_heads=heads,
        **options,
    )
    layer = LRNDecoderLayer(cfg).eval()
    with torch.no_grad():
        for parameter in layer.parameters():  # biases and normalisation too
            parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def inputs(layer, sentences=2, beams=3, length=5, padding=1):
    """Arguments of the layer for one step; the last sentence ends with padding."""
    width = layer.out_proj.out_features
    mask = None
    if padding > 0:
        mask = torch.zeros(sentences, length, dtype=torch.bool)
        mask[-1, length - padding :] = True
    with torch.no_grad():
        keys_values = layer.encoder_attn.project(torch.randn(length, sentences, 6))
    x, state = torch.randn(1, sentences * beams, width), torch.randn(1, sentences * beams, width).tanh()
    return x, torch.empty(length, sentences, 6), mask, state, None, keys_values


def calls(layer, arguments, need_attn=True):
    """Results of the layer, and whether they come from the operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = layer(*arguments, need_attn)
    return results, any(event.name == "fairseq_lrn::lrn_decoder_step" for event in profile.events())


@settings(deadline=None)
@given(st.data())
def test_operator_equals_the_layer(data):
    layer = build(
        heads=data.draw(st.integers(1, 4)),
        head_dim=data.draw(st.sampled_from([1, 3, 8, 16, 31])),  # of kernels with 16 lanes
        ffn_embed_dim=data.draw(st.sampled_from([1, 15, 16, 33])),
        cell=data.draw(st.sampled_from(["lrn", "olrn"])),
        cell_activation=data.draw(st.sampled_from(["tanh", "identity"])),
        seed=data.draw(st.integers(0, 9)),
    )
    length = data.draw(st.integers(1, 40))
    sentences, beams = data.draw(st.sampled_from(ROWS))
    arguments = inputs(layer, sentences, beams, length, data.draw(st.integers(0, length - 1)))
    need_attn = data.draw(st.booleans())
    with torch.no_grad():
        expected = layer(*arguments, need_attn)
        layer.make_generation_fast_()
        found = layer(*arguments, need_attn)
    assert found[2] is arguments[5]
    for ours, theirs in zip(found, expected):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability):
    """Each compiled version of the kernels; one that the machine lacks falls back to the best it has."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-k", "equals", __file__],
        env={**os.environ, "FAIRSEQ_LRN_CPU_CAPABILITY": capability},
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("cell", ["lrn", "olrn"])
def test_fairseqs_call_before_translating_switches_to_the_operator(cell):
    layer = build(cell=cell)
    arguments = inputs(layer)
    with torch.no_grad():
        assert not calls(layer, arguments)[1]
        layer.make_generation_fast_(name="decoder.layers.0", need_attn=True)
        assert calls(layer, arguments)[1]
        assert not calls(layer, (*arguments[:5], None))[1]  # the first step, before there are keys
        assert not calls(
            layer.double(), [x if x is None or x.dtype == torch.bool else x.double() for x in arguments]
        )[1]
    layer.float()
    x, _, _, _ = calls(layer, arguments)[0]
    x.sum().backward()  # with gradients it is the layer's own
    assert layer.out_proj.weight.grad is not None


@pytest.mark.parametrize(
    "options, call",
    [({"cell": "gru"}, {}), ({"activation_fn": "gelu"}, {}), ({}, {"retain_dropout": True})],
    ids=str,
)
def test_what_the_operator_does_not_know_is_the_layers_own(options, call):
    layer = build(**options)
    layer.make_generation_fast_(**call)
    with torch.no_grad():
        assert not calls(layer, inputs(layer))[1]


def test_other_layers_in_the_place_of_linear_ones_are_kept():
    layer = build()
    layer.out_proj = torch.nn.Linear(8, 8, bias=False)
    layer.make_generation_fast_()
    with torch.no_grad():
        assert not calls(layer, inputs(layer))[1]


def test_bad_input_is_refused():
    layer = build()
    x, _, mask, state, _, keys_values = inputs(layer)
    parameters = [p.detach() for p in layer.parameters()]

    def run(x=x, state=state, keys_values=keys_values, mask=mask, parameters=parameters):
        return torch.ops.fairseq_lrn.lrn_decoder_step(
            x, state, keys_values, mask, parameters, activation="tanh", output_gate=False, need_weights=True
        )

    run()
    for bad in (
        {"x": x[:, :-1]},
        {"x": x.expand(2, -1, -1)},
        {"x": x.double()},
        {"state": state[0]},
        {"keys_values": keys_values[0]},
        {"keys_values": keys_values[..., :-1]},
        {"keys_values": keys_values.transpose(2, 3).contiguous().transpose(2, 3)},
        {"mask": mask[:, :-1]},
        {"mask": mask.float()},
        {"parameters": parameters[:-1]},
        {"parameters": parameters[2:] + parameters[:2]},
        {"parameters": [p.t() for p in parameters]},
    ):
        with pytest.raises(RuntimeError):
            run(**bad)
