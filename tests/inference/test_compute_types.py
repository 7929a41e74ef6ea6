"""Translating with products of bfloat16 and int8: their definition in PyTorch, and where they are refused."""

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from translations import (
    PAD,
    TranslationTask,
    batch,
    build,
    build_generator,
    translate,
    values_of,
)

from fairseq_lrn.inference import COMPUTE_TYPES
from fairseq_lrn.models import DeepNMTModel, LRNModel
from fairseq_lrn.modules import LRN

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.fairseq_lrn, "lrn_scan"), reason="needs the compiled operators"
)
every_instruction_set = pytest.mark.parametrize(
    "instruction_set",
    ["default", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"],
    indirect=True,
)
OPTIONS = {"beam": 3, "max_len_b": 12}


# The definition


def to_int8(x):
    """Integers (N, S) from -127 to 127 and the scale (N, 1) of each row."""
    most = x.abs().amax(1, keepdim=True).clamp(min=1e-35)
    return (x * (torch.tensor(127.0) / most)).round(), most / 127


def product(x, weight, bias, compute_type):
    """``F.linear`` with both factors rounded; int8's sums are exact, and its result rounds in this order."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    rows = x.flatten(0, -2)
    if compute_type == "int8":
        (q, scale), (w, weight_scale) = to_int8(rows), to_int8(weight)
        sums = (q.double() @ w.double().t()).float()
        return (sums * scale * weight_scale.t() + bias).unflatten(0, x.shape[:-1])
    if compute_type == "bfloat16":
        rows, weight = rows.bfloat16(), weight.bfloat16()
    return (rows.double() @ weight.double().t() + bias).float().unflatten(0, x.shape[:-1])


def rounded(model, compute_type):
    """A copy of ``model`` whose products are :func:`product`'s."""
    model = copy.deepcopy(model)
    multiply = functools.partial(product, compute_type=compute_type)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(multiply, weight=module.weight, bias=module.bias)
        if isinstance(module, LRN):
            module._project = lambda x, weights: multiply(x, *weights[:2])
    return model


# Products


@every_instruction_set
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 14),
    features=st.integers(1, 80),
    outputs=st.integers(1, 150),
    size=st.sampled_from([1e-39, 1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_products(instruction_set, rows, features, outputs, size, seed):
    """int8 has one result, bit by bit, on every instruction set."""
    torch.manual_seed(seed)
    x, bias = torch.randn(rows, features) * size, torch.randn(outputs)
    weight = torch.randn(outputs, features) * torch.rand(outputs, 1)
    x[:1], weight[:1] = 0, 0
    for compute_type in COMPUTE_TYPES:
        found = torch.classes.fairseq_lrn.Product(weight, bias, compute_type).forward(x)
        expected = product(x, weight, bias, compute_type)
        tolerance = 0 if compute_type == "int8" else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1, size))


@every_instruction_set
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_the_largest_sums(instruction_set, compute_type):
    """Of 8,192 products of the largest numbers, which would saturate in 16 bits."""
    for sign in (1, -1):
        x, weight = torch.ones(7, 8192), torch.full((70, 8192), sign / 127)
        layer = torch.classes.fairseq_lrn.Product(weight, torch.zeros(70), compute_type)
        expected = product(x, weight, None, compute_type)
        torch.testing.assert_close(layer.forward(x), expected, rtol=1e-4, atol=0)


@every_instruction_set
def test_the_smallest_numbers(instruction_set):
    """Rows whose 127th part is no normal number, and of zeros alone."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20), torch.randn(70, 20)
    for size in (1e-35, 1e-37, 1e-39, 0.0):
        layer = torch.classes.fairseq_lrn.Product(weight * size, torch.zeros(70), "int8")
        large = layer.forward(x * 1e25)
        torch.testing.assert_close(large, product(x * 1e25, weight * size, None, "int8"), rtol=0, atol=0)
        torch.testing.assert_close(large, x * 1e25 @ (weight * size).t(), rtol=0.1, atol=1e-11)


@every_instruction_set
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(instruction_set, compute_type, value):
    """They make their own row not finite, and no other."""
    x, weight = torch.ones(3, 20), torch.ones(5, 20)
    x[1, 7] = value
    layer = torch.classes.fairseq_lrn.Product(weight, torch.zeros(5), compute_type)
    assert layer.forward(x).isfinite().all(1).tolist() == [True, False, True]


# Translations


@every_instruction_set
@pytest.mark.parametrize("compute_type", ["bfloat16", "int8"])
@pytest.mark.parametrize("options", [{}, {"cell": "olrn", "encoder_embed_dim": 24}], ids=str)
def test_translations(instruction_set, compute_type, options):
    """As PyTorch's modules find them with rounded factors, unless a value next to a tie rounds otherwise."""
    model = build(decoder_attention_heads=1, **options)  # the scale of queries is a power of two
    reference = rounded(model, compute_type)
    expected = translate(build_generator([reference], TranslationTask, prepared=False, **OPTIONS), batch())
    exact = translate(build_generator([model], **OPTIONS), batch())
    found = translate(build_generator([model], compute_type=compute_type, **OPTIONS), batch())
    count, errors = differences(found, expected)
    assert count >= len(found) * OPTIONS["beam"] - 1
    assert errors.median() < 1e-5 and errors.max() < 0.1
    assert differences(found, exact)[1].median() > 1e-3


def differences(found, others):
    """How many hypotheses have the same words, and the differences of their words' log-probabilities."""
    pairs = [(a, b) for beams in zip(found, others) for a, b in zip(*beams) if a["tokens"].equal(b["tokens"])]
    return len(pairs), torch.cat([(a["positional_scores"] - b["positional_scores"]).abs() for a, b in pairs])


def test_generators_of_two_types_take_turns():
    """With one model, and its weights' changes."""
    model = build()
    generators = [build_generator([model], compute_type=kind, **OPTIONS) for kind in COMPUTE_TYPES]
    before = [values_of(translate(generator, batch())) for generator in generators]
    assert len({values[0].sum().item() for values in before} | {values[3].item() for values in before}) > 3
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    for kind, generator, values in zip(COMPUTE_TYPES, generators, before):
        found = values_of(translate(generator, batch()))
        assert not all(map(torch.equal, found, values))
        fresh = build_generator([copy.deepcopy(model)], compute_type=kind, **OPTIONS)
        assert all(map(torch.equal, found, values_of(translate(fresh, batch()))))


def test_the_model_itself_computes_as_before():
    """A prepared model scores in float32 whatever type its generator has."""
    model, source = build(), batch()["net_input"]["src_tokens"]
    with torch.no_grad():
        before = model.encoder(source)["encoder_out"][0]
        translate(build_generator([model], compute_type="int8", **OPTIONS), batch())
        words = source.t().ne(PAD)
        torch.testing.assert_close(model.encoder(source)["encoder_out"][0][words], before[words])


# Where PyTorch's modules translate


def refuse(message, models, sample=None, **options):
    with pytest.raises(ValueError, match=f"is int8, but must be float32 .*{message}"):
        translate(build_generator(models, compute_type="int8", **{**OPTIONS, **options}), sample or batch())


@pytest.mark.parametrize(
    "model_class, options, reason",
    [
        (LRNModel, {"cell": "gru"}, "encoder.layers.0.rnn is a"),
        (LRNModel, {"adaptive_softmax_cutoff": [10, 30]}, "has other modules than a LRNDecoder"),
        (DeepNMTModel, {}, "the model is a DeepNMTModel"),
    ],
)
def test_other_models(model_class, options, reason):
    refuse(reason, [build(model_class, **options)])


def test_other_types_and_devices():
    refuse("is torch.float16 on cpu", [build().half()])
    if torch.cuda.is_available():
        refuse("is torch.float32 on cuda", [build(device="cuda")], batch(device="cuda"))


@pytest.mark.parametrize(
    "options", [{"sampling": True}, {"no_repeat_ngram_size": 2}, {"diverse_beam_groups": 3}]
)
def test_other_searches(options):
    refuse("plain beam search with one model", [build()], **options)


def test_ensembles():
    refuse("plain beam search with one model", [build(), build(seed=1)])


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        refuse("autocast is on", [build()])


def test_other_generators():
    refuse("a SequenceScorer", [build()], score_reference=True)


def test_unknown_types():
    with pytest.raises(ValueError, match="compute_type must be float32, bfloat16 or int8, got int4"):
        torch.classes.fairseq_lrn.Product(torch.ones(2, 2), torch.ones(2), "int4")
    with pytest.raises(ValueError, match="x must have 2 features, got 3"):
        torch.classes.fairseq_lrn.Product(torch.ones(2, 2), torch.ones(2), "int8").forward(torch.ones(2, 3))
