"""A model that was changed by hand translates as it was changed, also after make_generation_fast_.

Each change is made to copies of a model, before and after fairseq prepares them for translation. Step by step
they must give the scores of a copy that was not prepared, which must not be those of the unchanged model.
"""

import argparse
import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from batches import SMALL, sentences, task
from fairseq.modules import FairseqDropout
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations, prune

from fairseq_lrn.models import DeepNMTModel, LRNModel
from fairseq_lrn.modules import LRN
from fairseq_lrn.tasks.translation import LRNTranslationTask

DROPOUT = {"dropout": 0.3, "activation_dropout": 0.3, "attention_dropout": 0.3}
FORMS = [(DeepNMTModel, "lrn"), (DeepNMTModel, "atr")]


def build(*args):
    """Return a copy, since building takes longer."""
    return copy.deepcopy(make(*args))


@functools.lru_cache(maxsize=None)
def make(model_class=LRNModel, cell="lrn"):
    torch.manual_seed(0)
    options = {**SMALL, **DROPOUT, "cell": cell}
    options = {k: v for k, v in options.items() if k in model_class.config.__dataclass_fields__}
    model = model_class.build_model(model_class.config(**options), task()).eval()
    with torch.no_grad():  # biases and normalisation too
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


@torch.no_grad()
def score(model):
    """Return the scores of each step of a search with three hypotheses a sentence."""
    torch.manual_seed(0)
    pad = model.encoder.padding_idx
    order = torch.arange(2).repeat_interleave(3)
    source, target = sentences([5, 3], pad, left=True), sentences([3] * 6, pad, seed=2)
    encoder_out = model.encoder.reorder_encoder_out(model.encoder(source), order)
    state = {}
    steps = [model.decoder(target[:, :t], encoder_out, incremental_state=state)[0] for t in (1, 2, 3)]
    return torch.cat(steps, 1)


def assert_followed(change, *form):
    """``change(model)`` has its effect, be it made before fairseq's call or after it."""
    unchanged, changed, early, late = (build(*form) for _ in range(4))
    change(changed)
    change(early)
    early.make_generation_fast_()
    late.make_generation_fast_()
    torch.testing.assert_close(score(late), score(unchanged), rtol=1e-4, atol=1e-4)
    change(late)
    expected = score(changed)
    assert (expected - score(unchanged)).abs().max() > 1e-3
    for one in (early, late):
        torch.testing.assert_close(score(one), expected, rtol=1e-5, atol=1e-5)


def names(kind=nn.Module, model_class=LRNModel, cell="lrn"):
    """Of the modules that ``model_class`` calls, but for layers above the first: those of a ``kind``."""
    model, called = build(model_class, cell), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    score(model)
    return [
        name
        for name, module in model.named_modules()
        if name in called and isinstance(module, kind) and ".layers.1" not in name
    ]


def each(kind=nn.Module):
    return pytest.mark.parametrize("name", names(kind))


def halve(x):
    """Half of every floating-point tensor in ``x``."""
    if torch.is_tensor(x):
        return x / 2 if x.is_floating_point() else x
    if isinstance(x, dict):
        return {name: halve(value) for name, value in x.items()}
    return type(x)(map(halve, x)) if isinstance(x, (tuple, list)) else x


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@each()
def test_forward_hooks(name):
    assert_followed(lambda model: model.get_submodule(name).register_forward_hook(lambda _, x, y: halve(y)))


@pytest.mark.parametrize("name", [name for name in names() if name not in ("encoder", "decoder")])
def test_forward_pre_hooks(name):
    """What is read is other: words for embeddings, features for all else."""

    def change(module, inputs):
        first = inputs[0]
        return (first.sin() if first.is_floating_point() else first + 1, *inputs[1:])

    assert_followed(lambda model: model.get_submodule(name).register_forward_pre_hook(change))


@each()
def test_a_forward_of_its_own(name):
    def change(model):
        module = model.get_submodule(name)
        forward = type(module).forward
        module.forward = lambda *args, **kwargs: halve(forward(module, *args, **kwargs))

    assert_followed(change)


@each()
def test_subclasses(name):
    """As adapters are put in: a module of a subclass in the place of another."""

    def change(model):
        module = model.get_submodule(name)
        adapter = type("Adapter", (type(module),), {"forward": lambda *x, **kw: halve(forward(*x, **kw))})
        forward = type(module).forward
        other = copy.deepcopy(module)
        other.__class__ = adapter
        put(model, name, other)

    assert_followed(change)


@each((nn.Linear, nn.LayerNorm))
def test_other_modules(name):
    assert_followed(lambda model: put(model, name, nn.Sequential(model.get_submodule(name), nn.Tanh())))


@pytest.mark.parametrize(("model_class", "cell"), FORMS)
def test_hooks_of_linear_layers(model_class, cell):
    for name in names(nn.Linear, model_class, cell):
        assert_followed(
            lambda model, name=name: model.get_submodule(name).register_forward_hook(lambda _, x, y: y / 2),
            model_class,
            cell,
        )


@pytest.mark.parametrize(("model_class", "cell"), FORMS)
def test_every_linear_layer_is_called(model_class, cell):
    """None is passed over, whose hooks would not run."""
    linears = {name for name, module in build(model_class, cell).named_modules() if type(module) is nn.Linear}
    assert {name for name in linears if ".layers.1" not in name} == set(names(nn.Linear, model_class, cell))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, LRN])
def test_global_hooks(register, kind):
    def hook(module, x, y=None):
        if type(module) is kind:
            return (x[0].sin(), *x[1:]) if y is None else halve(y)

    plain, fast = build(), build()
    fast.make_generation_fast_()
    before = score(plain)
    handle = getattr(modules, register)(hook)
    try:
        expected, found = score(plain), score(fast)
    finally:
        handle.remove()
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each(nn.LayerNorm)
def test_eps(name):
    assert_followed(lambda model: setattr(model.get_submodule(name), "eps", 1e-2))


@each(nn.LayerNorm)
@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(16, elementwise_affine=False),
        nn.LayerNorm(16, bias=False) if "bias" in nn.LayerNorm.__init__.__annotations__ else nn.Identity(),
        nn.Identity(),
    ],
    ids=["no affine", "no bias", "none"],
)
def test_other_normalisation(name, norm):
    assert_followed(lambda model: put(model, name, norm))


def test_other_activation():
    def change(model):
        model.encoder.layers[0].ffn.activation_fn = model.decoder.layers[1].ffn.activation_fn = F.gelu

    assert_followed(change)


def test_other_heads():
    def change(model):
        for layer in model.decoder.layers:
            layer.encoder_attn.head_dim //= 2

    assert_followed(change)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_normalised_recurrence(side):
    def change(model):
        torch.manual_seed(3)
        model.get_submodule(side).layers[0].rnn = LRN(
            16, 16, bidirectional=side == "encoder", layer_norm=True
        )

    assert_followed(change)


@pytest.mark.parametrize(
    "name", [name for name in names(nn.Linear) if name.endswith(("fc1", "q_proj", "out_proj"))]
)
@pytest.mark.parametrize("how", ["weight_norm", "old weight_norm", "pruning"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_parametrized_weights(name, how):
    def change(model):
        module = model.get_submodule(name)
        with torch.no_grad():
            if how == "weight_norm":
                parametrizations.weight_norm(module).parametrizations.weight.original0.mul_(2)
            elif how == "old weight_norm":
                nn.utils.weight_norm(module).weight_g.mul_(2)
            else:
                prune.l1_unstructured(module, "weight", 0.5)

    assert_followed(change)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*TypedStorage")
def test_quantized_weights():
    def change(model):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)

    assert_followed(change)


@each(FairseqDropout)
def test_dropout_after_all(name):
    assert_followed(lambda model: setattr(model.get_submodule(name), "apply_during_inference", True))


@each(FairseqDropout)
def test_dropout_switched_on_by_hand(name):
    """After fairseq's call, which switches it off."""
    plain, fast = build(), build()
    fast.make_generation_fast_()
    before = score(plain)
    for model in (plain, fast):
        model.get_submodule(name).train()
    expected = score(plain)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(score(fast), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_is_followed():
    plain, model = build(), build()
    model.make_generation_fast_()
    fast = copy.deepcopy(model)
    for one in (plain, fast):
        one.decoder.layers[0].ffn.fc1.register_forward_hook(lambda _, x, y: y / 2)
    expected = score(plain)
    torch.testing.assert_close(score(fast), expected, rtol=1e-5, atol=1e-5)
    assert (score(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    plain, fast = build(), build()
    fast.make_generation_fast_()
    with torch.autocast("cpu", dtype):
        expected, found = score(plain), score(fast)
    assert expected.dtype == found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_replaced_weights():
    def change(model):
        torch.manual_seed(3)
        for name, parameter in list(model.named_parameters()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Parameter(torch.randn_like(parameter) / 4))

    assert_followed(change)


def find(task_class, model, **options):
    torch.manual_seed(0)
    words = task().target_dictionary
    translation = task_class(TranslationConfig(left_pad_source=True), words, words)
    generator = translation.build_generator([model], argparse.Namespace(beam=3, max_len_b=9, **options))
    source = sentences([7, 3, 5], model.encoder.padding_idx, left=True)
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([7, 3, 5])}}
    found = translation.inference_step(generator, [model], sample)
    return [(x["tokens"].tolist(), float(x["score"])) for beam in found for x in beam]


def change_class(part, **methods):
    part.__class__ = type("Changed", (type(part),), methods)


def forward_hook(model):
    model.decoder.register_forward_hook(lambda _, x, y: (y[0].sin(), y[1]))


def encoder_hook(model):
    model.encoder.register_forward_hook(lambda _, x, y: halve(y))


def other_forward(model):
    forward = model.decoder.forward

    def changed(*args, features_only=False, **kwargs):
        y, extra = forward(*args, features_only=features_only, **kwargs)
        return (y if features_only else 3 * y.sin()), extra

    model.decoder.forward = changed


def other_encoder(model):
    forward = model.encoder.forward
    model.encoder.forward = lambda *args, **kwargs: halve(forward(*args, **kwargs))


def subclass(model):
    forward = type(model.decoder).forward
    change_class(
        model.decoder,
        forward=lambda *x, features_only=False, **kw: (3 * forward(*x, **kw)[0].sin(), {"attn": [None]}),
    )


def other_output(model):
    output_layer = model.decoder.output_layer
    model.decoder.output_layer = lambda features: 3 * output_layer(features).sin()


def output_hook(model):
    model.decoder.output_projection.register_forward_hook(lambda _, x, y: 3 * y.sin())


def probabilities(model):
    change_class(
        model,
        get_normalized_probs=lambda self, net, log_probs, sample=None: (3 * net[0].sin()).log_softmax(-1),
    )


@pytest.mark.parametrize(
    "change",
    [
        forward_hook,
        encoder_hook,
        other_forward,
        other_encoder,
        subclass,
        other_output,
        output_hook,
        probabilities,
    ],
)
@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
def test_both_tasks_find_the_same(model_class, change):
    """fairseq's search calls ``forward`` of encoder and decoder, so that their own hooks do not run."""
    models = [build(model_class) for _ in range(2)]
    before = find(TranslationTask, build(model_class))
    for model in models:
        change(model)
    expected = find(TranslationTask, models[0])
    found = find(LRNTranslationTask, models[1])
    if change not in (forward_hook, encoder_hook):
        assert expected != before
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
