"""A step of the decoder with fixed places for what it reads and writes, as a CUDA graph where there is a GPU.

The same steps run without graphs on the CPU. What they find is what fairseq's own search finds.
"""

import copy
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
    halve_in_place,
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
    """Counts searches and captures. On the CPU a step stands in for its graph."""

    searches = captures = 0
    at_first = True  # capture when a shape is first used

    def __init__(self, model, device_type):
        super().__init__(model, device_type)
        self._captures = True
        self.failures = []  # errors of the next captures

    def __reduce__(self):
        return type(None), ()

    def search(self, *arguments):
        found = super().search(*arguments)
        self.searches += found is not None
        return found

    def _step(self, *arguments):
        for _ in range(1 + self.at_first):
            step = super()._step(*arguments)
        return step

    def _graph(self, step):
        self.captures += 1
        if self.failures:
            raise self.failures.pop(0)
        return super()._graph(step) if self._device_type == "cuda" else SimpleNamespace(replay=step.compute)


class Task(LRNTranslationTask):
    """Translates by the steps, on the CPU too."""

    at_first = True

    def build_generator(self, models, *args, **kwargs):
        generator = super().build_generator(models, *args, **kwargs)
        assert isinstance(generator, BeamSearchGenerator)
        generator.translator.native = lambda *_: None
        device = next(models[0].parameters()).device
        generator.translator.graphs = models[0].graphs = Steps(models[0], device.type)
        models[0].graphs.at_first = self.at_first
        return generator


class SecondTask(Task):
    """As the task itself does, the second use of a shape captures."""

    at_first = False


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
    assert len(generator.translator.graphs._steps) < 24


@pytest.mark.parametrize("device", DEVICES)
def test_few_steps_are_kept(device, monkeypatch):
    """Those used last. The memory of keys and values is that of the largest step, and no more."""
    monkeypatch.setattr("fairseq_lrn.inference.cuda_graph._STEPS", 3)
    model = build(device=device)
    generator = build_generator([model], SecondTask, beam=2, min_len=6, max_len_b=6)
    graphs, found = generator.translator.graphs, {}

    def kept(lengths):
        for n in lengths:
            hypotheses = translate(generator, batch([n] * 3, device=device))
            assert_same_hypotheses(hypotheses, found.setdefault(n, hypotheses))
        return [step.padding_mask.size(1) for step in graphs._steps.values()]

    assert kept([400, 1, 17]) == [448, 16, 32]
    assert kept([400]) == [16, 32, 448]
    assert kept([33]) == [32, 448, 48]
    assert kept([1, 17, 1, 17]) == [48, 16, 32]
    assert graphs.captures == 3  # of 448, and then of 16 and 32
    largest = 3 * 448 * 2 * 2 * 16  # sentences, positions, keys and values, layers, width
    assert largest <= graphs._memory.numel() <= 1.25 * largest


@pytest.mark.parametrize("device", DEVICES)
def test_the_second_use_of_a_shape_captures(device):
    """The first launches kernels one by one, and the third only replays."""
    model = build(device=device)
    generator = build_generator([model], SecondTask, beam=2, max_len_b=12)
    graphs, sample, expected = generator.translator.graphs, batch(device=device), None
    for captures in (0, 1, 1):
        found = translate(generator, sample)
        assert_same_hypotheses(found, expected or found)
        expected, (step,) = found, graphs._steps.values()
        assert graphs.captures == captures == (step.graph is not None)
    translate(generator, batch(seed=2, device=device))
    assert graphs.captures == 1
    other = build_generator([model], LRNTranslationTask, beam=2, max_len_b=7, lenpen=0.5)
    assert other.translator is generator.translator
    translate(other, sample)  # all generators of a model use its graphs
    assert graphs.captures == 1


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_without_memory_for_a_graph_others_are_dropped(device, times):
    """It is tried twice. The next batch tries again."""
    generator = build_generator([build(device=device)], SecondTask, beam=2, min_len=6, max_len_b=6)
    graphs, samples = generator.translator.graphs, [batch([n] * 3, device=device) for n in (70, 20)]
    expected = [translate(generator, sample) for sample in 2 * samples[:1] + samples[1:]][1:]
    assert [step.graph is not None for step in graphs._steps.values()] == [True, False]
    memory = graphs._memory
    graphs.failures = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")] * times
    assert_same_hypotheses(translate(generator, samples[1]), expected[1])
    assert [step.graph is not None for step in graphs._steps.values()] == [times == 1]
    assert graphs.captures == 3 and graphs._memory is memory
    for _ in range(2):
        for sample, wanted in zip(samples, expected):
            assert_same_hypotheses(translate(generator, sample), wanted)
    assert all(step.graph is not None for step in graphs._steps.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_search_goes_on_in_a_smaller_step_without_memory_for_its_graph(device):
    """The graph of the step that it leaves is dropped."""
    sample = batch([1 + i * i % 23 for i in range(70)], device=device)
    generator = build_generator([build(ends=-1.0, device=device)], SecondTask, beam=3, max_len_b=40)
    graphs, expected = generator.translator.graphs, translate(generator, sample)
    steps = len(graphs._steps)
    assert steps > 1
    assert_same_hypotheses(translate(generator, sample), expected)
    assert graphs.captures == steps
    first, *_, last = graphs._steps.values()
    last.graph = None
    graphs.failures = [RuntimeError("CUDA error: out of memory")]
    assert_same_hypotheses(translate(generator, sample), expected)
    assert list(graphs._steps.values()) == [last]
    assert first.graph is None and last.graph is not None


@pytest.mark.parametrize("device", DEVICES)
def test_other_failures_are_not_repeated(device, caplog):
    generator = build_generator([build(device=device)], SecondTask, beam=2, max_len_b=12)
    graphs, sample = generator.translator.graphs, batch(device=device)
    graphs.failures = [RuntimeError("operation not permitted when stream is capturing")]
    expected = translate(generator, sample)
    for _ in range(3):
        assert_same_hypotheses(translate(generator, sample), expected)
    assert graphs.captures == 1
    (message,) = (record.message for record in caplog.records if "one by one" in record.message)
    assert "not permitted" in message


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_free_while_the_model_trains(device):
    """Validation with --eval-bleu sets the mode before each batch."""
    model = build(device=device)
    generator = build_generator([model], SecondTask, prepared=False, beam=2, max_len_b=12)
    graphs = generator.translator.graphs
    for turn in range(1, 3):
        for _ in range(2):
            model.eval()
            translate(generator, batch(device=device))
        assert graphs.captures == turn
        model.train()
        assert graphs._memory is None and not graphs._steps


@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_with_one_model(device):
    """One changes the model's weights between its searches."""
    model = build(device=device)
    generators = [build_generator([model], LRNTranslationTask, beam=2, max_len_b=12) for _ in range(2)]
    graphs = generators[0].translator.graphs = Steps(model, torch.device(device).type)
    generators[0].translator.native = lambda *_: None
    samples = [batch(seed=seed, device=device) for seed in range(6)]
    expected = [translate(generators[0], sample) for sample in samples]

    def work(generator):
        for sample, wanted in zip(4 * samples, 4 * expected):
            for layer in model.decoder.layers if generator is generators[1] else ():
                layer.out_proj.bias = torch.nn.Parameter(layer.out_proj.bias.detach().clone())
            assert_same_hypotheses(translate(generator, sample), wanted)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, generators))
    assert graphs.searches == 6 + 2 * 24


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
        layer.final_layer_norm.eps += 0.5


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
    assert generator.translator.graphs.searches == 6


@pytest.mark.parametrize("change", [lambda model: model.half(), halve_in_place], ids=["half", "in place"])
@pytest.mark.parametrize("device", DEVICES)
def test_types_that_changed_count(device, change):
    model, sample = build(device=device), batch(device=device)
    generator = build_generator([model], Task, prepared=False, beam=3, max_len_b=12)
    for _ in range(2):
        translate(generator, sample)
    change(model)
    expected = build_generator([copy.deepcopy(model)], Task, prepared=False, beam=3, max_len_b=12)
    assert_same_hypotheses(translate(generator, sample), translate(expected, sample))


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
    assert generator.translator.graphs.searches == 0


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
    assert type(generator.translator.graphs) is StepGraphs
    for _ in range(2):
        translate(generator, batch(device="cuda"))
    assert all(step.graph is not None for step in generator.translator.graphs._steps.values())
    assert len(generator.translator.graphs._steps) > 0
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
    assert used[1:] == used[1:2] * 3


@needs_gpu
def test_graphs_have_workspaces_of_their_own():
    """torch.compile clears those of PyTorch, and so does a graph that is dropped."""
    generator = build_generator([build(device="cuda")], Task, beam=3, max_len_b=12)
    # the longest first: it needs most memory, and new memory drops all graphs
    graphs, samples = generator.translator.graphs, [batch([n] * 9, device="cuda") for n in (80, 50, 20)]
    expected = [translate(generator, sample) for sample in samples]
    torch._C._cuda_clearCublasWorkspaces()
    graphs._steps.popitem(last=False)
    taken = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    captures = graphs.captures
    for sample, wanted in zip(samples[1:], expected[1:]):
        assert_same_hypotheses(translate(generator, sample), wanted)
    assert graphs.captures == captures
    assert_same_hypotheses(translate(generator, samples[0]), expected[0])
    assert all(x.isnan().all() for x in taken)


@needs_gpu
def test_two_models_capture_at_once():
    models = [build(seed=seed, device="cuda") for seed in range(2)]
    samples = [batch([n] * 3, device="cuda") for n in (3, 20, 40, 70)]
    expected = [
        [translate(build_generator([copy.deepcopy(model)], beam=2, max_len_b=6), x) for x in samples]
        for model in models
    ]
    generators = [build_generator([model], Task, beam=2, max_len_b=6) for model in models]
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda generator: [translate(generator, x) for x in samples], generators)
        for one, other in zip(itertools.chain(*found), itertools.chain(*expected)):
            assert_same_hypotheses(one, other)
    assert all(step.graph is not None for model in models for step in model.graphs._steps.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_moves_to_another_gpu():
    model = build(device="cuda:0")
    generator = build_generator([model], Task, prepared=False, beam=3, max_len_b=12)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        model.to(device)
        for seed in range(3):
            plain = build_generator([build()], beam=3, max_len_b=12)
            wanted = words_of(translate(plain, batch(seed=seed)))
            assert words_of(translate(generator, batch(seed=seed, device=device))) == wanted
    assert generator.translator.graphs.captures > 2


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
assert all(step.graph is None for step in generator.translator.graphs._steps.values()), "graphs"
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
