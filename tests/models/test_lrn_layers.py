"""Layers in one operator, against their own definition."""

import pytest
import torch
from batches import SMALL, task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from fairseq_lrn.models import LRNModel
from fairseq_lrn.models.lrn import LRNConfig
from fairseq_lrn.models.lrn_layers import LRNDecoderLayer, LRNEncoderLayer

LAYERS = [LRNEncoderLayer, LRNDecoderLayer]
# sentences and their hypotheses: up to eight rows have a kernel each, more have the BLAS
ROWS = [(1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (3, 2), (1, 7), (2, 4), (3, 3), (70, 1)]


def build(kind, heads=2, head_dim=4, ffn_embed_dim=12, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {f"{side}_embed_dim": heads * head_dim for side in ("encoder", "decoder")}
    sizes.update({f"{side}_ffn_embed_dim": ffn_embed_dim for side in ("encoder", "decoder")})
    layer = kind(LRNConfig(**sizes, decoder_attention_heads=heads, **options)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():  # biases and normalisation too
            parameter.add_(torch.randn_like(parameter) / 8)
    return layer


def inputs(layer, sentences=2, beams=3, length=5, padding=1, need_attn=True):
    """Arguments of the layer, the decoder's for one step; the last sentence ends with padding."""
    width = layer.out_proj.out_features
    mask = None
    if padding > 0:
        mask = torch.zeros(sentences, length, dtype=torch.bool)
        mask[-1, length - padding :] = True
    encoder_x = torch.randn(length, sentences, width)
    if isinstance(layer, LRNEncoderLayer):
        return [encoder_x, mask]
    with torch.no_grad():
        keys_values = layer.encoder_attn.project(encoder_x)
    x, state = torch.randn(1, sentences * beams, width), torch.randn(1, sentences * beams, width).tanh()
    return [x, encoder_x, mask, state, None, keys_values, need_attn]


def uses_operator(layer, arguments, *operators):
    """Whether the layer's results come from one of the operators, a layer's own if none is named."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(*arguments)
    operators = operators or ("lrn_encoder_layer", "lrn_decoder_step")
    return any(event.name in [f"fairseq_lrn::{name}" for name in operators] for event in profile.events())


@pytest.mark.parametrize("kind", LAYERS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_operator_equals_the_layer(kind, instruction_set, data):
    layer = build(
        kind,
        heads=data.draw(st.integers(1, 4)),
        head_dim=data.draw(st.sampled_from([1, 3, 8, 16, 31])),  # of kernels with 16 lanes
        ffn_embed_dim=data.draw(st.sampled_from([1, 15, 16, 33])),
        cell=data.draw(st.sampled_from(["lrn", "olrn"])),
        cell_activation=data.draw(st.sampled_from(["tanh", "identity"])),
        seed=data.draw(st.integers(0, 9)),
    )
    length = data.draw(st.integers(1, 40))
    sentences, beams = data.draw(st.sampled_from(ROWS))
    padding, need_attn = data.draw(st.integers(0, length - 1)), data.draw(st.booleans())
    arguments = inputs(layer, sentences, beams, length, padding, need_attn)
    with torch.no_grad():
        expected = layer(*arguments)
        layer.make_generation_fast_()
        assert layer._places
        found = layer(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", ["lrn", "olrn"])
@pytest.mark.parametrize("kind", LAYERS)
def test_fairseqs_call_before_translating_switches_to_the_operator(kind, cell):
    layer = build(kind, cell=cell)
    arguments = inputs(layer)
    with torch.no_grad():
        assert not uses_operator(layer, arguments)
        layer.make_generation_fast_(name="layers.0", need_attn=True)
        assert uses_operator(layer, arguments)
    assert not uses_operator(layer, arguments)  # with gradients
    with torch.no_grad():
        layer.double()
        doubles = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
        assert not uses_operator(layer, doubles)


def test_first_step_has_no_keys():
    layer = build(LRNDecoderLayer)
    layer.make_generation_fast_()
    arguments = inputs(layer, beams=1)
    arguments[5] = None
    with torch.no_grad():
        assert not uses_operator(layer, arguments)


@pytest.mark.parametrize(
    "options, call",
    [({"cell": "gru"}, {}), ({"activation_fn": "gelu"}, {}), ({}, {"retain_dropout": True})],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_the_operator_does_not_know_is_the_layers_own(kind, options, call):
    layer = build(kind, **options)
    layer.make_generation_fast_(**call)
    with torch.no_grad():
        assert not uses_operator(layer, inputs(layer))


def sparsify(layer):
    prune.random_unstructured(layer.ffn.fc1, "weight", 0.5)


def parametrize(layer):
    torch.nn.utils.parametrizations.weight_norm(layer.rnn, "weight_ih_l0")
    with torch.no_grad():
        layer.rnn.parametrizations.weight_ih_l0.original0.mul_(2)


def quantize(layer):
    torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, inplace=True)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*TypedStorage")
@pytest.mark.parametrize("change", [sparsify, parametrize, quantize])
@pytest.mark.parametrize("kind", LAYERS)
def test_changed_weights_are_the_layers_own(kind, change):
    before, after = build(kind), build(kind)
    change(before)
    for layer in (before, after):
        layer.make_generation_fast_()
    torch.manual_seed(0)
    change(after)
    after.load_state_dict(before.state_dict())
    arguments = inputs(build(kind))
    with torch.no_grad():
        assert not uses_operator(before, arguments) and not uses_operator(after, arguments)
        torch.testing.assert_close(after(*arguments), before(*arguments))


@pytest.mark.parametrize("kind", LAYERS)
def test_replaced_parameters_are_followed(kind):
    layer, other = build(kind), build(kind, seed=1)
    layer.make_generation_fast_()
    layer.load_state_dict(other.state_dict(), assign=True)
    arguments = inputs(layer)
    with torch.no_grad():
        assert uses_operator(layer, arguments)
        torch.testing.assert_close(layer(*arguments), other(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers_in_the_place_of_linear_ones_are_kept(kind):
    layer = build(kind)
    layer.out_proj = torch.nn.Linear(layer.out_proj.in_features, layer.out_proj.out_features, bias=False)
    layer.make_generation_fast_()
    with torch.no_grad():
        assert not uses_operator(layer, inputs(layer))


@pytest.mark.parametrize("kind", LAYERS)
def test_strides(kind):
    layer = build(kind)
    layer.make_generation_fast_()
    arguments = inputs(layer)
    strided = [x.mT.contiguous().mT if torch.is_tensor(x) else x for x in arguments]
    with torch.no_grad():
        torch.testing.assert_close(layer(*strided), layer(*arguments))


def test_bad_input_is_refused():
    layer = build(LRNDecoderLayer)
    x, _, mask, state, _, keys_values, _ = inputs(layer)
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
        {"mask": mask[:, :-1]},
        {"mask": mask.float()},
        {"parameters": parameters[:-1]},
        {"parameters": parameters[2:] + parameters[:2]},
        {"parameters": [p.t() for p in parameters]},
        {"parameters": [p[:1] if i in (12, 13) else p for i, p in enumerate(parameters)]},  # the query's
        {"x": x[..., :0], "state": state[..., :0], "keys_values": keys_values[:, :, :, :, :0]},
    ):
        with pytest.raises(RuntimeError):
            run(**bad)


def test_the_decoder_scores_words_with_linear():
    model = LRNModel.build_model(LRNConfig(**SMALL), task()).eval()
    features = torch.randn(3, 1, SMALL["decoder_embed_dim"])
    layer = model.decoder.output_projection
    expected = layer(features)
    assert uses_operator(model.decoder.output_layer, [features], "linear")
    torch.testing.assert_close(model.decoder.output_layer(features), expected)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert model.decoder.output_layer(features) is seen[0]  # hooks are not passed over
    model.decoder.output_projection = torch.nn.Identity()
    assert model.decoder.output_layer(features) is features
