"""The task lrn_translation finds what fairseq's own translation finds."""

import argparse
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from batches import DEVICES, SMALL, SMALL_OPTIONS, sentences, task
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig

from fairseq_lrn.models import DeepNMTModel, LRNModel
from fairseq_lrn.tasks.translation import BeamSearchGenerator, LRNTranslationTask

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]
FIXED = "--cpu --num-workers 0 --required-batch-size-multiple 1".split()
LENGTHS = [7, 3, 11, 5, 1]


def build(model_class=LRNModel, device="cpu", **options):
    """A random model whose sentences end early, and at different lengths."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k in model_class.config.__dataclass_fields__}
    model = model_class.build_model(model_class.config(**{**sizes, **options}), task()).to(device).eval()
    source = sentences(LENGTHS, model.encoder.padding_idx, left=True).to(device)
    with torch.no_grad():  # </s> like what is looked for on average
        features, _ = model(source, None, source, features_only=True)
        weight = model.decoder.output_projection.weight
        weight.mul_(4 / weight.norm(dim=1, keepdim=True))
        weight[2] = 4 * nn.functional.normalize(features.mean((0, 1)), dim=0)
    lengths = torch.tensor(LENGTHS, device=device)
    return model, {"net_input": {"src_tokens": source, "src_lengths": lengths}}


def assert_same(model, sample, generate=None, **options):
    """Both generators find the same hypotheses, in the same order; returns them."""
    options = {"max_len_b": 12, **options}
    expected, found = (
        generator([model], task().target_dictionary, **options).generate([model], sample, **(generate or {}))
        for generator in (SequenceGenerator, BeamSearchGenerator)
    )
    assert [len(beam) for beam in found] == [len(beam) for beam in expected]
    for theirs, ours in zip(*map(itertools.chain.from_iterable, (expected, found))):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].device == value.device or value.numel() == 0
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
@pytest.mark.parametrize("beam_size", [1, 2, 5, 25])
@pytest.mark.parametrize("device", DEVICES)
def test_fairseqs_hypotheses(device, beam_size, model_class):
    found = assert_same(*build(model_class, device), beam_size=beam_size)
    assert len({len(x["tokens"]) for beam in found for x in beam}) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype):
    model, sample = build()
    found = BeamSearchGenerator([model.to(dtype)], task().target_dictionary).generate([model], sample)
    for beam in found:
        for x in beam:
            assert x["attention"].dtype == x["score"].dtype == x["positional_scores"].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"len_penalty": 0.6},
        {"len_penalty": 3.0, "beam_size": 3},
        {"normalize_scores": False},
        {"min_len": 4},
        {"max_len_a": 0.5, "max_len_b": 2},
        {"max_len_b": 1},
        {"max_len": 5},
    ],
    ids=str,
)
def test_options_of_the_search(options):
    assert_same(*build(), **{"beam_size": 4, **options})


@pytest.mark.parametrize("cell", ["lstm", "sru"])
def test_other_units(cell):
    assert_same(*build(cell=cell), beam_size=4)


def test_sentences_alone():
    model, sample = build()
    for row in sample["net_input"]["src_tokens"].split(1):
        words = row[row.ne(1)][None]
        one = {"net_input": {"src_tokens": words, "src_lengths": torch.tensor([words.size(1)])}}
        assert_same(model, one, beam_size=4)


def test_other_first_token():
    assert_same(*build(), {"bos_token": 7}, beam_size=3)


def test_min_len_above_the_longest():
    model, sample = build()
    generator = BeamSearchGenerator([model], task().target_dictionary, min_len=9, max_len_b=8)
    with pytest.raises(ValueError, match="--min-len is 9, but must not be above the longest, 8"):
        generator.generate([model], sample)


@pytest.mark.parametrize(
    "generate, options",
    [
        ({"prefix_tokens": torch.tensor([[9, 5]] * len(LENGTHS))}, {}),
        ({}, {"temperature": 1.5}),
        ({}, {"unk_penalty": 3.0}),
        ({}, {"no_repeat_ngram_size": 1}),
        ({}, {"tokens_to_suppress": ["w3", "w4"]}),
        ({}, {"beam_size": 60}),
    ],
    ids=str,
)
def test_all_else_goes_fairseqs_way(generate, options):
    assert_same(*build(), generate, **{"beam_size": 3, **options})


def test_ensembles_and_sampling_go_fairseqs_way():
    model, sample = build()
    dictionary = task().target_dictionary
    found = []
    for generator in (SequenceGenerator, BeamSearchGenerator):
        torch.manual_seed(1)
        search = Sampling(dictionary)
        sampled = generator([model], dictionary, beam_size=2, max_len_b=9, search_strategy=search)
        both = generator([model, build(cell="olrn")[0]], dictionary, beam_size=2, max_len_b=9)
        found.append([x.generate(None, sample) for x in (sampled, both)])
    words = [[[x["tokens"].tolist() for beam in beams for x in beam] for beams in one] for one in found]
    assert words[0] == words[1]


def nan_embedding(model):
    """Of the word 9, which is in the second sentence only."""
    with torch.no_grad():
        model.encoder.embed_tokens.weight[9] = torch.nan


def overflow(model):
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(1e5)
    model.half()


def all_minus_infinity(model):
    model.decoder.output_projection.register_forward_hook(lambda _, x, y: torch.full_like(y, -torch.inf))


def nan_later(model):
    """From the fourth step on, in the second sentence only, or in what is left of the batch."""
    steps = []

    def hook(module, x, y):
        steps.append(1)
        if len(steps) > 3:
            y[1 if len(y) > 1 else 0 :] = torch.nan
        return y

    with torch.no_grad():
        model.decoder.output_projection.weight[2] *= -1  # no </s> before
    model.decoder.output_projection.register_forward_hook(hook)


@pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])
@pytest.mark.parametrize(
    ("beam", "options"),
    [(1, {}), (5, {}), (5, {"print_alignment": "hard"}), (5, {"allowed": range(2, 54)})],
    ids=str,
)
@pytest.mark.parametrize("change", [nan_embedding, overflow, all_minus_infinity, nan_later])
def test_a_sentence_without_scores_is_named(change, beam, options, model_class):
    """By this package's search, and by that search of fairseq's that ends without an error of its own."""
    model, sample = build(model_class)
    sample["id"] = torch.tensor([50, 51, 52, 53, 54])
    source = sample["net_input"]["src_tokens"]
    source[source == 9] = 10
    source[1, -2] = 9
    change(model)
    translation = LRNTranslationTask(TranslationConfig(), task().source_dictionary, task().target_dictionary)
    options = {**options}
    allowed = options.pop("allowed", None)
    generator = translation.build_generator(
        [model],
        argparse.Namespace(beam=beam, max_len_b=12, **options),
        prefix_allowed_tokens_fn=allowed and (lambda sentence, tokens: list(allowed)),
    )
    one = 50 if change in (overflow, all_minus_infinity) else 51
    cause = (
        "the search has found no end" if allowed else "the model's scores of all next words are NaN or minus"
    )
    message = f"^sentence {one}.* has no translation: {cause}"
    with pytest.raises(ValueError, match=message):
        translation.inference_step(generator, [model], sample)
    if change is nan_embedding and not allowed:
        rest = [0, 2, 3, 4]
        sample["net_input"] = {name: x[rest] for name, x in sample["net_input"].items()}
        found = translation.inference_step(generator, [model], sample)
        assert all(torch.isfinite(x["score"]) for beam in found for x in beam)


@pytest.fixture(scope="module")
def diverged(checkpoint, tmp_path_factory):
    """A checkpoint with a word whose embedding is NaN."""
    state = torch.load(checkpoint, weights_only=True)
    path = tmp_path_factory.mktemp("diverged") / "checkpoint.pt"
    state["model"]["encoder.embed_tokens.weight"][3] = torch.nan  # <unk>
    torch.save(state, path)
    return path


def test_commands_name_the_sentence(run, data, diverged):
    out = run("fairseq-interactive", data, *PLUGIN, "--cpu", "--task", "lrn_translation", "--path", diverged,
              "--buffer-size", 3, "--batch-size", 3, "-s", "en", "-t", "de", "--max-len-b", 20,
              input="▁12\n☃\n▁12 ▁12\n", check=False)  # fmt: skip
    assert re.search(r"ValueError: sentence \d of the batch, '<unk> ?', has no translation", out)
    assert "H-" not in out


def test_the_hub_names_the_sentence(data, diverged):
    hub = LRNModel.from_pretrained(
        diverged.parent, diverged.name, str(data), source_lang="en", target_lang="de"
    )
    with pytest.raises(ValueError, match=r"sentence 1, '<unk> ?', has no translation"):
        hub.translate(["▁12", "☃"])


@pytest.fixture(scope="module")
def checkpoint(run, data, tmp_path_factory):
    """A small model after some updates, trained with the task and validated by BLEU."""
    folder = tmp_path_factory.mktemp("checkpoint")
    out = run("fairseq-train", data, *PLUGIN, *FIXED, "--task", "lrn_translation", "--arch", "lrn_tiny",
              *SMALL_OPTIONS, "--share-all-embeddings", "--optimizer", "adam", "--lr", "0.005", "--seed", 3,
              "--max-tokens", 400, "--max-update", 12, "--eval-bleu", "--eval-bleu-args", '{"beam": 2}',
              "--eval-bleu-remove-bpe", "sentencepiece", "--log-format", "simple",
              "--save-dir", folder)  # fmt: skip
    assert re.search(r"valid on 'valid' subset .* bleu \d", out)
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize(
    "options", ["--beam 3", "--beam 1", "--beam 4 --nbest 4 --lenpen 0.5", "--beam 2 --print-alignment"]
)
def test_generate_prints_the_same(run, data, checkpoint, options):
    printed = []
    for name in ("translation", "lrn_translation"):
        out = run("fairseq-generate", data, *PLUGIN, *FIXED, "--task", name, "--path", checkpoint,
                  "--max-len-b", 20, *options.split())  # fmt: skip
        printed.append(re.findall(r"^([SHDPA]-\d+)\t(.*)$", out, re.M))
    assert len(printed[0]) == len(printed[1]) > 0
    for (kind, theirs), (other, ours) in zip(*printed):
        assert kind == other
        for a, b in zip(re.split(r"[\t ]", theirs), re.split(r"[\t ]", ours)):
            assert a == b or abs(float(a) - float(b)) < 2e-4  # of scores, the last printed digit may differ


def test_interactive_prints_the_same(run, data, checkpoint, test_sentences):
    lines = [*test_sentences, "", "☃ 12"]
    printed = []
    for name in ("translation", "lrn_translation"):
        out = run("fairseq-interactive", data, *PLUGIN, "--cpu", "--task", name, "--path", checkpoint,
                  "-s", "en", "-t", "de", "--beam", 3, "--max-len-b", 20, "--buffer-size", 9,
                  "--batch-size", 9,
                  input="".join(f"{line}\n" for line in lines))  # fmt: skip
        printed.append(re.findall(r"^D-(\d+)\t\S+\t(.*)$", out, re.M))
    assert printed[0] == printed[1]
    assert [int(i) for i, _ in printed[1]] == list(range(len(lines)))
