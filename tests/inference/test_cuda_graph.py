"""A step of the decoder with fixed places for what it reads and writes, as a CUDA graph where there is a GPU.

The same steps run without graphs on the CPU. What they find is what fairseq's own search finds.
"""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from batches import DEVICES, ROOT
from hypothesis import given, settings
from translations import (
    assert_forced,
    assert_same,
    assert_same_hypotheses,
    batch,
    build,
    build_generator,
    searches,
    translate,
    values_of,
    words_of,
)

from fairseq_lrn.inference import BeamSearchGenerator, BeamSearchGeneratorWithAlignment
from fairseq_lrn.inference.cuda_graph import StepGraphs
from fairseq_lrn.models import DeepNMTModel
from fairseq_lrn.tasks.translation import LRNTranslationTask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Steps(StepGraphs):
    """Says how many searches it made."""

    searches = 0

    def search(self, *arguments):
        self.searches += 1
        return super().search(*arguments)


class Task(LRNTranslationTask):
    """Translates by the steps, on the CPU too."""

    def build_generator(self, models, *args, **kwargs):
        generator = super().build_generator(models, *args, **kwargs)
        assert isinstance(generator, BeamSearchGenerator)
        generator.translator.native = lambda *_: None
        device = next(models[0].parameters()).device
        generator.graphs = models[0].graphs = Steps(models[0], device.type)
        return generator


def on(device, sample):
    return {"net_input": {name: x.to(device) for name, x in sample["net_input"].items()}}


def same(model, sample, *arguments, **options):
    """As :func:`assert_same`; the steps must have been used."""
    found = assert_same(model, sample, *arguments, task=Task, **options)
    assert model.graphs.searches == 1
    return found


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=25)
@given(searches(decoder_layers=(1, 3), sentences=(1, 9)))
def test_any_search(device, search):
    model, source, call, options = search
    call = {name: value.to(device) if torch.is_tensor(value) else value for name, value in call.items()}
    model = build(device=device, **model)
    assert_same(model, batch(device=device, **source), call, task=Task, **options)
    assert model.graphs.searches == (2 * options["beam"] <= len(model.decoder.dictionary))


@pytest.mark.parametrize("beam", [1, 2, 5, 27])
@pytest.mark.parametrize("cell", ["lrn", "olrn"])
@pytest.mark.parametrize("device", DEVICES)
def test_beams(device, cell, beam):
    found = same(build(cell=cell, device=device), batch(device=device), beam=beam)
    assert [len(hypotheses) for hypotheses in found] == [beam] * 5
    assert len({len(x["tokens"]) for hypotheses in found for x in hypotheses}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"min_len": 4},
        {"min_len": 12},
        {"min_len": 0, "max_len_b": 0},
        {"max_len_b": 1},
        {"lenpen": 0.6, "unkpen": -4.0},
        {"unkpen": 9.0, "min_len": 3, "temperature": 0.5},
        {"temperature": 2.5, "unnormalized": True},
        {"print_alignment": "hard"},
        {"print_alignment": "soft"},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_options(device, options):
    for left in (True, False):
        same(build(device=device), batch(left=left, device=device), **{"beam": 4, **options})


@pytest.mark.parametrize("device", DEVICES)
def test_prefixes(device):
    prefix = torch.tensor([[9, 5], [7, 1], [1, 1], [8, 9], [6, 1]], device=device)
    for beam in (1, 3):
        same(build(device=device), batch(device=device), {"prefix_tokens": prefix}, beam=beam)


@pytest.mark.parametrize("device", DEVICES)
def test_sentences_that_end_at_once(device):
    """As many rows follow as there were sentences. Such prefixes fairseq's own search does not take."""
    prefix = {"prefix_tokens": torch.tensor([[2], [7], [9], [2]])}
    expected = translate(build_generator([build()], beam=2, max_len_b=12), batch([7, 3, 11, 5]), **prefix)
    model = build(device=device)
    generator = build_generator([model], Task, beam=2, max_len_b=12)
    found = translate(generator, batch([7, 3, 11, 5], device=device), **prefix)
    assert words_of(found) == words_of(expected)
    assert model.graphs.searches == 1


@pytest.mark.parametrize("device", DEVICES)
def test_sentences_that_end_leave_their_places(device):
    """Of many sentences fewer and fewer are left, in fewer and fewer places; the attention is theirs."""
    lengths = [1 + i * i % 23 for i in range(70)]
    model = build(ends=-1.0, device=device)
    sample = batch(lengths, device=device)
    found = same(model, sample, beam=3, max_len_b=40)
    ends = {max(len(x["tokens"]) for x in beam) for beam in found}
    assert len(ends) > 5
    assert len(model.graphs._steps) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_many_batches_share_few_steps(device):
    model, other = build(device=device), build()
    generator = build_generator([model], Task, beam=3, max_len_b=12)
    plain = build_generator([other], beam=3, max_len_b=12)
    for seed in range(12):
        lengths = [1 + (seed * i) % 19 for i in range(1 + 2 * seed)]
        expected = translate(plain, batch(lengths, seed=seed))
        found = translate(generator, batch(lengths, seed=seed, device=device))
        for x in itertools.chain(*found):
            for name in x:
                x[name] = x[name].cpu()
        assert_same_hypotheses(found, expected)
    assert len(generator.graphs._steps) < 24


@pytest.mark.parametrize("device", DEVICES)
def test_few_steps_are_kept(device, monkeypatch):
    monkeypatch.setattr("fairseq_lrn.inference.cuda_graph._GRAPHS", 2)
    model = build(device=device)
    generator = build_generator([model], Task, beam=2, max_len_b=12)
    expected = [translate(generator, batch([n] * 3, device=device)) for n in (3, 20, 40, 70)]
    assert len(generator.graphs._steps) == 2
    for n, wanted in zip((3, 20, 40, 70), expected):
        assert_same_hypotheses(translate(generator, batch([n] * 3, device=device)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lrn", "olrn"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_types(device, cell, dtype):
    """Rounding may choose otherwise; scores are still those of the words."""
    tolerance = {"rtol": 2e-2, "atol": 5e-2}
    model = build(cell=cell).to(device, dtype)
    fresh = copy.deepcopy(model)
    sample = batch(device=device)
    found = same(model, sample, beam=3, margin=2e-2, tolerance=tolerance, forced=False)
    for x in itertools.chain(*found):
        assert x["score"].dtype == x["positional_scores"].dtype == x["attention"].dtype == torch.float32
    assert_forced([fresh], sample, found, tolerance=tolerance)


def write(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def replace(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def assign(model):
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    torch.nn.Module.load_state_dict(model, state, assign=True)


def learn(model):
    """Steps of training, by fairseq's own kind of optimizer: in place."""
    torch.manual_seed(0)
    model.train()
    source = batch(seed=5, device=next(model.parameters()).device)["net_input"]["src_tokens"]
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        net_output = model(source, None, source)
        loss = -model.get_normalized_probs(net_output, True)[..., 9].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def change_eps(model):
    for layer in model.decoder.layers:
        layer.final_layer_norm.eps = 0.5


@pytest.mark.parametrize("change", [write, replace, assign, learn, change_eps])
@pytest.mark.parametrize("device", DEVICES)
def test_changed_models_count(device, change):
    """With the same generator, trained and translated with in turn."""
    model, sample = build(device=device), batch(device=device)
    generator = build_generator([model], Task, prepared=False, beam=3, max_len_b=12)
    for _ in range(3):
        before = translate(generator, sample)
        change(model)
        expected = translate(
            build_generator([copy.deepcopy(model)], LRNTranslationTask, prepared=False, beam=3, max_len_b=12),
            sample,
        )
        assert_same_hypotheses(translate(generator, sample), expected)
        assert [x["score"] for x in expected[0]] != [x["score"] for x in before[0]]
    assert generator.graphs.searches == 6


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_exactly_known_goes_another_way(device):
    hooked = build(device=device)
    hooked.decoder.layers[0].ffn.register_forward_hook(lambda module, inputs, output: -output)
    others = ({"cell": "gru"}, {"model_class": DeepNMTModel}, {"checkpoint_activations": True})
    for model in (hooked, *(build(device=device, **other) for other in others)):
        assert_same(model, batch(device=device), task=Task, beam=3)
        assert model.graphs.searches == 0
    generator = build_generator([build(device=device)], Task, beam=30, max_len_b=12)
    translate(generator, batch(device=device))  # it wants more words than there are
    assert generator.graphs.searches == 0


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
        {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0"},
        {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 4},
        {"dropout": 0.5, "word_dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3},
        {"share_all_embeddings": True, "activation_fn": "gelu", "decoder_attention_heads": 1},
        {"encoder_embed_dim": 8, "alignment_layer": 0, "alignment_heads": 1, "decoder_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_options_of_models(device, options):
    same(build(device=device, **options), batch(device=device), beam=3)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_the_callers_own(device):
    generator = build_generator([build(device=device)], Task, beam=3, max_len_b=12)
    sample = batch(device=device)
    with torch.inference_mode():
        found = translate(generator, sample)
    kept = [value.clone() for value in values_of(found)]
    for value in values_of(translate(generator, sample)):
        value.zero_()
    assert all(map(torch.equal, values_of(found), kept))
    assert all(map(torch.equal, values_of(translate(generator, sample)), kept))


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_without_finite_scores_leaves_no_trace(device, value):
    model = build(device=device)
    generator = build_generator([model], Task, beam=3, max_len_b=12)
    expected = translate(generator, batch(device=device))
    weight = model.decoder.output_projection.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
        model.encoder.layer_norm.weight.add_(value)
    with pytest.raises(FloatingPointError, match="sentence"):
        translate(generator, batch(device=device))
    with torch.no_grad():
        weight.copy_(kept)
        model.encoder.layer_norm.weight.copy_(build().encoder.layer_norm.weight)
    assert_same_hypotheses(translate(generator, batch(device=device)), expected)


# On a GPU


@needs_gpu
def test_the_task_takes_graphs():
    """Without a word of the user's."""
    model = build(device="cuda")
    generator = build_generator([model], beam=3, max_len_b=12)
    assert type(generator.graphs) is StepGraphs
    translate(generator, batch(device="cuda"))
    assert all(step.graph is not None for step in generator.graphs._steps.values())
    assert len(generator.graphs._steps) > 0
    generator = build_generator([model], print_alignment="hard", beam=3, max_len_b=12)
    assert type(generator) is BeamSearchGeneratorWithAlignment
    assert_same(build(device="cuda"), batch(device="cuda"), beam=3, print_alignment="hard")


@needs_gpu
def test_memory_does_not_grow():
    generator = build_generator([build(device="cuda")], beam=3, max_len_b=12)
    samples = [batch([n] * 9, device="cuda") for n in (20, 5, 13)]
    used = []
    for _ in range(4):
        for sample in samples:
            translate(generator, sample)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[3]


FAILS = """
import logging, sys
import torch
from translations import assert_same_hypotheses, batch, build, build_generator, translate
import fairseq_lrn.inference.cuda_graph as graphs

class Waiting(graphs._Step):
    def compute(self):
        super().compute()
        self.found.sum().item()  # waits for the device, which no graph can

messages = []
graphs.logger.warning = lambda *words: messages.append(words)
options = dict(beam=3, max_len_b=12)
expected = translate(build_generator([build(device="cuda")], **options), batch(device="cuda"))
graphs._Step = Waiting
generator = build_generator([build(device="cuda")], **options)
for _ in range(3):
    assert_same_hypotheses(translate(generator, batch(device="cuda")), expected)
assert all(step.graph is None for step in generator.graphs._steps.values()), "graphs"
assert len(messages) == 1, messages
assert "one by one" in messages[0][0]
x = torch.ones(3, device="cuda")
assert (x + x).sum().item() == 6
"""


@needs_gpu
def test_without_graphs_kernels_are_launched_one_by_one():
    """In a process of its own, as a capture that fails may leave traces in PyTorch."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, (ROOT / "tests", ROOT)), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
