"""The native translator: which models it takes, exact whatever the batch, and what it refuses."""

import copy
import itertools
import logging
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batches import task
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from hypothesis import HealthCheck, given, settings
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrizations, prune
from translations import (
    EOS,
    OF_TRAINING,
    PAD,
    UNK,
    assert_same,
    batch,
    build,
    build_bigram,
    build_generator,
    halve_in_place,
    searches,
    translate,
    values_of,
    words_of,
)

from fairseq_lrn.inference import COMPUTE_TYPES, Translator
from fairseq_lrn.inference.reading import read
from fairseq_lrn.models import DeepNMTModel, LRNModel
from fairseq_lrn.models.lrn import LRNConfig

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.fairseq_lrn, "lrn_scan"), reason="needs the compiled operators"
)
CLASSES = torch.classes.fairseq_lrn


def make(model, compute_type="float32"):
    """The native translator of ``model``, which it takes."""
    translator = Translator(model)
    assert translator.native(compute_type) is not None, translator.reason
    return translator.native(compute_type)


def begin(native, source, beam=3, min_len=1, max_len=12, words=(EOS, PAD, EOS, UNK), prefix=None):
    return native.translation(source, beam, min_len, max_len, *words, 0.0, 1.0, True, prefix, 1.0)


def finish(translation, seconds=0.1):
    found = None
    while found is None:
        found = translation.advance(seconds)
    return found


def search(native, source, **options):
    return finish(begin(native, source, **options))


def source_of(*args, **kwargs):
    return batch(*args, **kwargs)["net_input"]["src_tokens"]


# Results


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=searches())
def test_every_instruction_set(instruction_set, found):
    model, source, call, options = found
    assert_same(build(**model), batch(**source), call, **options)


@settings(deadline=None, max_examples=6)
@given(searches(words=(20, 400), encoder_layers=(4, 12), widest=20, sentences=(1, 40), longest=60))
def test_deep_models_and_larger_batches(found):
    """Rounding grows from layer to layer, most where normalisation is over two features."""
    model, source, call, options = found
    assert_same(build(**model), batch(**source), call, tolerance={"rtol": 2e-4, "atol": 2e-4}, **options)


def test_a_large_vocabulary():
    """More panels of words than one, the last one in part; the best words from everywhere."""
    model = build(words=40_000, ends=0.0)
    assert_same(model, batch([9, 30, 2], 40_000), beam=12, max_len_b=8)


def test_a_sentence_of_500_words_and_many_short_ones(instruction_set):
    lengths = [500] + [1 + i % 7 for i in range(299)]
    assert_same(build(seed=3), batch(lengths), beam=1, max_len_b=5, forced=False)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(instruction_set, size):
    """Exponentials neither overflow nor vanish."""
    model = build(words=300)
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(size)
        for layer in model.decoder.layers:
            layer.encoder_attn.q_proj.weight.mul_(min(size, 100))
    assert_same(model, batch(words=300), beam=4, tolerance={"rtol": 1e-4, "atol": 1e-4 * max(1, size)})


@pytest.mark.parametrize(
    "instruction_set, compute_type",
    [
        *itertools.product(["default", "avx2", "avx512"], COMPUTE_TYPES),
        ("avx2_vnni", "int8"),
        ("avx512_vnni", "int8"),
        ("avx512_bf16", "bfloat16"),
    ],
    indirect=["instruction_set"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_exact_whatever_the_batch(instruction_set, compute_type, threads):
    """Neither other sentences, nor their order, padding, beams or threads change a bit."""
    native = make(build(words=700, encoder_embed_dim=48, decoder_embed_dim=40, seed=2), compute_type)
    lengths = [1 + i * 7 % 40 for i in range(23)]
    source = source_of(lengths, 700)
    torch.set_num_threads(threads)
    counts, sizes, scores, words, log_probs, _ = search(native, source)
    rows = list(zip(scores.split(counts.tolist()), *split_rows(counts, sizes, words, log_probs)))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    moved = search(native, source[order])
    for i, row in zip(
        order.tolist(), zip(moved[2].split(moved[0].tolist()), *split_rows(*moved[:2], *moved[3:5]))
    ):
        assert all(map(torch.equal, row, rows[i]))
    for i in range(0, 23, 3):
        alone = search(native, source[i : i + 1, 40 - lengths[i] :])
        assert all(map(torch.equal, (alone[2], alone[3], alone[4]), rows[i]))


def split_rows(counts, sizes, *values):
    """Of each sentence the values of all its words."""
    words = [sum(some) for some in (part.tolist() for part in sizes.split(counts.tolist()))]
    return [value.split(words) for value in values]


def test_two_threads_with_one_translator():
    native = make(build())
    sources = [source_of(seed=seed) for seed in range(8)]
    expected = [search(native, source) for source in sources]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            for found, wanted in zip(threads.map(lambda source: search(native, source), sources), expected):
                assert all(map(torch.equal, found, wanted))


def test_threads_with_one_translation():
    """They advance it one after the other."""
    native, source = make(build()), source_of([4, 9, 5, 7] * 10)
    expected = search(native, source)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found in threads.map(finish, [begin(native, source)] * 4, [1e-4] * 4):
                assert all(map(torch.equal, found, expected))


def test_more_rows_than_a_worker_has():
    model = build()
    assert_same(model, batch([3, 5, 2, 4] * 75), beam=5, max_len_b=4, forced=False)


def test_interrupting():
    """Ctrl-C ends a translation that would take minutes, and the translator goes on."""
    model = build_bigram(torch.full((12, 12), -2.0).index_fill(1, torch.tensor([EOS]), -60.0))
    native = make(model)
    expected = search(native, source_of([3], 12))
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    began = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            search(native, source_of([3] * 50, 12), max_len=10_000_000)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 30
    assert all(map(torch.equal, search(native, source_of([3], 12)), expected))


# Which models


@pytest.mark.parametrize(
    "name", [name for name, model in ARCH_MODEL_REGISTRY.items() if model is LRNModel and name != "lrn"]
)
def test_every_architecture_translates_natively(name):
    """In the recipes, which name architectures and options of training."""
    cfg = OmegaConf.structured(LRNConfig(share_all_embeddings=True, dropout=0.3, encoder_layerdrop=0.1))
    OmegaConf.set_struct(cfg, False)
    values = {}

    class Given:
        def __setattr__(self, option, value):
            values[option] = value

        def __getattr__(self, option):
            raise AttributeError(option)

    ARCH_CONFIG_REGISTRY[name](Given())
    cfg.update({**values, "encoder_layers": 1, "decoder_layers": 1})
    make(LRNModel.build_model(cfg, task()).eval())


@pytest.mark.parametrize(
    "options",
    [
        *OF_TRAINING,
        {"activation_fn": "gelu_accurate"},
        {"activation_fn": "gelu_fast"},
        {"activation_fn": "linear"},
        {"no_scale_embedding": True, "activation_fn": "gelu", "cell": "olrn", "cell_activation": "tanh"},
        {"encoder_embed_dim": 20, "decoder_embed_dim": 9, "decoder_attention_heads": 3},
        {"alignment_layer": 0, "alignment_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("copied", [False, True])
def test_options_that_translate_natively(options, copied):
    model = build(**options)
    make(copy.deepcopy(model) if copied else model)
    assert_same(model, batch(), beam=3)


def other_kind(model):
    model.encoder.layers[1].ffn.fc1 = nn.Bilinear(3, 3, 3)


def other_place(model):
    model.encoder.layer_norm = nn.Linear(16, 16)


def another_module(model):
    model.decoder.layers[0].adapter = nn.Linear(3, 3)


def hook(model):
    model.encoder.layers[0].rnn.register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.encoder.layers[0].rnn.register_forward_pre_hook(lambda *_: None)


def forward(model):
    model.decoder.layers[1].ffn.forward = lambda x: x


def method(model):
    model.decoder.output_layer = lambda x: x


def dropout(model):
    model.decoder.layers[0].dropout_module.p = 0.1
    model.decoder.layers[0].dropout_module.apply_during_inference = True


def training(model):
    model.decoder.layers[0].dropout_module.train()


def two_activations(model):
    model.encoder.layers[0].ffn.activation_fn = torch.tanh


def own_activation(model):
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        layer.ffn.activation_fn = torch.sin


def max_norm(model):
    model.encoder.embed_tokens.max_norm = 1.0


def no_bias(model):
    model.encoder.layer_norm.bias = None


def gates(model):
    model.decoder.layers[0].rnn.output_gate = True


@pytest.mark.parametrize(
    "change, reason",
    [
        (other_kind, "encoder.layers.1.ffn.fc1 is a torch.nn.modules.linear.Bilinear"),
        (other_place, "encoder.layer_norm is a torch.nn.modules.linear.Linear"),
        (another_module, "decoder.layers.0 has other modules than a LRNDecoderLayer"),
        (hook, "encoder.layers.0.rnn has a hook"),
        (pre_hook, "encoder.layers.0.rnn has a hook"),
        (forward, "decoder.layers.1.ffn has a forward of its own"),
        (method, "decoder has a output_layer of its own"),
        (dropout, "decoder.layers.0.dropout_module drops out while it translates"),
        (training, "decoder.layers.0.dropout_module is in training mode"),
        (two_activations, "layers have more than one activation_fn"),
        (own_activation, "the activation function is sin"),
        (max_norm, "encoder.embed_tokens has a max_norm"),
        (no_bias, "encoder.layer_norm has no weight or no bias"),
        (gates, "layers have more than one output_gate"),
        (lambda model: prune.l1_unstructured(model.decoder.layers[0].out_proj, "weight", 0.5), "has a hook"),
        (lambda model: parametrizations.weight_norm(model.decoder.layers[0].out_proj), "ParametrizedLinear"),
        (lambda model: model.half(), "is torch.float16 on cpu"),
        (halve_in_place, "is torch.float16 on cpu"),
        (lambda model: model.to("meta"), "is torch.float32 on meta"),
    ],
)
def test_models_that_translate_with_their_own_modules(change, reason, caplog):
    """Changed before or after the translator was made; the log says why, once."""
    model = build()
    early, late = Translator(model), Translator(model)
    assert late.native() is not None
    caplog.set_level(logging.INFO)
    change(model)
    for translator in (early, late):
        assert translator.native() is None
        assert reason in translator.reason
        translator.refresh()
        assert translator.native() is None
    (message, again) = (record.message for record in caplog.records)
    assert message == again == f"the model translates with PyTorch's modules: {early.reason}"


@pytest.mark.parametrize(
    "model_class, options, reason",
    [
        (LRNModel, {"cell": "gru"}, "encoder.layers.0.rnn is a"),
        (LRNModel, {"adaptive_softmax_cutoff": [10, 30]}, "decoder has other modules than a LRNDecoder"),
        (DeepNMTModel, {}, "the model is a DeepNMTModel"),
    ],
)
def test_other_models(model_class, options, reason):
    translator = Translator(build(model_class, **options))
    assert translator.native() is None
    assert translator.reason.startswith(reason)


def test_hooks_on_all_modules():
    translator = Translator(build())
    assert translator.native() is not None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert translator.native() is None
    finally:
        handle.remove()
    assert translator.native() is not None


def test_autocast():
    """Its types are the modules' own."""
    model = build()
    expected = build_generator([build()], beam=2, max_len_b=5)
    generator = build_generator([model], beam=2, max_len_b=5, prepared=False)
    with torch.autocast("cpu", torch.bfloat16):
        lower = translate(generator, batch())
    difference = values_of(lower)[1] - values_of(translate(expected, batch()))[1]
    assert difference.abs().max() > 1e-4


def test_weights_are_packed_when_they_may_have_changed():
    model = build()
    translator = Translator.of(model)
    source, native = source_of(), translator.native()
    before = search(native, source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    assert translator.native() is native
    for change in (
        translator.refresh,
        model.eval,
        lambda: model.load_state_dict(model.state_dict()),
        lambda: setattr(model.decoder.layers[0].out_proj, "bias", nn.Parameter(torch.ones(16))),
        lambda: setattr(model.decoder, "embed_scale", 2.0),
    ):
        change()
        assert translator.native() is not native
        native = translator.native()
    after = search(native, source)
    assert not torch.equal(before[2], after[2])
    assert all(map(torch.equal, search(make(model), source), after))


def test_copies_have_no_translator():
    model = build()
    build_generator([model], prepared=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model.translator is not None and other.translator is None


# What is refused


def test_wrong_weights():
    weights, settings_ = read(build())
    settings_["compute_type"] = "float32"

    def refuse(message, change=None, kind=ValueError, **others):
        with pytest.raises(kind, match=message):
            CLASSES.Translator({**weights, **(change or {})}, *{**settings_, **others}.values())

    name = "decoder.layers.0.ffn.fc2.weight"
    refuse("decoder.layers.0.ffn.fc2.weight must have shape", {name: torch.zeros(3, 3)})
    refuse("decoder.layers.0.ffn.fc2.weight must have 2 dimensions, got 1", {name: torch.zeros(3)})
    refuse("must be float32 on the CPU, got Double", {name: weights[name].double()}, TypeError)
    refuse("weights must not have encoder.other", {"encoder.other": torch.zeros(3)})
    refuse("activation_fn must be linear, relu", activation_fn="sin")
    refuse("activation must be tanh or identity", activation="relu")
    refuse("compute_type must be float32, bfloat16 or int8, got float16", compute_type="float16")
    refuse("heads must divide the width, 16, got 3", heads=3)
    refuse("heads must divide the width, 16, got 0", heads=0)
    refuse("attention_layer must be from 0 to 1", attention_layer=2)
    refuse("attention_heads from 1 to 2", attention_heads=0)
    refuse("decoder.layers.0.rnn.weight_ih_l0 must have shape|encoder.layers.0", output_gate=True)
    for missing in weights:
        if "bias" not in missing or "norm" in missing:
            with pytest.raises(ValueError):
                CLASSES.Translator({k: v for k, v in weights.items() if k != missing}, *settings_.values())


def test_wrong_batches():
    native = make(build())
    source = source_of()
    for arguments, message in (
        ({"source": source.float()}, "src_tokens must be integers"),
        ({"source": source[0]}, "src_tokens must be \\(sentences, length\\)"),
        ({"source": source + 50}, "src_tokens must be from 0 to 53, but sentence 0 has"),
        ({"source": source - 9}, "src_tokens must be from 0 to 53"),
        ({"words": (EOS, PAD, 54, UNK)}, "words must be from 0 to 53, got 54"),
        ({"words": (-1, PAD, EOS, UNK)}, "words must be from 0 to 53, got -1"),
        ({"prefix": torch.full((5, 2), 54)}, "prefix_tokens must be from 0 to 53, got 54"),
        ({"prefix": torch.full((4, 2), 5)}, "prefix_tokens must be \\(5, length\\)"),
        ({"beam": 0}, "beam_size must be from 1 to the number of words, temperature positive"),
        ({"min_len": 13}, "min_length from 0 to max_length"),
    ):
        with pytest.raises((ValueError, IndexError, TypeError), match=message):
            search(native, **{"source": source, **arguments})
    assert search(native, source[:0])[0].numel() == 0


def test_wrong_steps():
    native = make(build())
    memory = native.project(torch.zeros(4, 2, 16), None)
    words = torch.tensor([5, 6, 7, 8])

    def step(words=words, memory=memory, mask=None, length=4, states=None, layer=1, heads=2):
        return native.step(words, memory, mask, length, states, layer, heads)

    features, states, attention = step()
    assert features.shape == (4, 16) and attention.shape == (4, 4)
    assert step(layer=7)[2] is None
    for arguments, message in (
        ({"words": words + 50}, "words must be from 0 to 53"),
        ({"words": words[:3]}, "there must be as many words for each of the 2 sentences, got 3"),
        ({"words": words[:0]}, "there must be as many words for each of the 2 sentences, got 0"),
        ({"length": 5}, "keys_values must have shape"),
        ({"memory": memory.double()}, "keys_values must be float32 on the CPU"),
        ({"states": states[:1]}, "states must have shape"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "padding_mask must be bool of shape \\(2, 4\\)"),
        ({"mask": torch.zeros(2, 4)}, "padding_mask must be bool"),
        ({"heads": 3}, "alignment_heads must be from 1 to 2, got 3"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            step(**arguments)
    with pytest.raises(ValueError, match="encoder_out must have 16 features, got 9"):
        native.project(torch.zeros(4, 2, 9), None)


def test_wrong_candidates():
    beam_search = CLASSES.BeamSearch(2, 3, 1, 9, EOS, PAD, EOS, UNK, 0.0, 1.0, True, None)
    assert beam_search.width() == 6 and beam_search.excluded() == [PAD, EOS]
    with pytest.raises(RuntimeError, match="log_probs and words must be \\(2, 6\\)"):
        beam_search.advance(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(RuntimeError, match="min_length must not be above max_length"):
        CLASSES.BeamSearch(2, 3, 10, 9, EOS, PAD, EOS, UNK, 0.0, 1.0, True, None)
    for sentences, beam in ((2, 2**62), (2**60, 1)):
        with pytest.raises(RuntimeError, match="sentences times beam_size must be less than"):
            CLASSES.BeamSearch(sentences, beam, 1, 9, EOS, PAD, EOS, UNK, 0.0, 1.0, True, None)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize(
    "cell, compute_type", [("lrn", "float32"), ("lrn", "bfloat16"), ("lrn", "int8"), ("gru", "float32")]
)
def test_a_sentence_without_a_translation_is_named(cell, compute_type, value):
    """Its embedding is not finite; those of the others are."""
    model, sample = build(cell=cell), batch([5, 4, 6])
    with torch.no_grad():
        model.encoder.embed_tokens.weight[0] = value
    sample["net_input"]["src_tokens"][1, -2] = 0
    sample["id"] = torch.tensor([30, 17, 5])
    with pytest.raises(FloatingPointError, match="no translation of sentence 17 has a finite score"):
        translate(build_generator([model], beam=2, compute_type=compute_type), sample)


def test_words_are_read_from_views():
    native = make(build())
    source = source_of()
    wide = torch.full((5, 2 * source.size(1)), 7)
    wide[:, ::2] = source
    for other in (wide[:, ::2], source.t().contiguous().t(), source.int()):
        assert all(map(torch.equal, search(native, other), search(native, source)))


def test_it_is_used():
    """By the generator; by fairseq's own, once the model is prepared."""
    model = build()
    generator = build_generator([model], prepared=False, beam=2, max_len_b=5)
    native = generator.translator.native()
    assert native is not None and model.encoder.translator is None
    found = words_of(translate(generator, batch()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.encoder), "forward", None)  # a class's, which no model sees
        assert words_of(translate(generator, batch())) == found
        model.make_generation_fast_()
        patch.setattr(type(model.decoder.layers[0]), "forward", None)
        patch.undo()
    assert model.encoder.translator is model.decoder.translator is model.translator
    names = itertools.chain(model.named_modules(), model.named_parameters(), model.named_buffers())
    assert not [name for name, _ in names if "translator" in name]
