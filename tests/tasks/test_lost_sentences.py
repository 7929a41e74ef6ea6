"""A sentence whose scores are no numbers is an error that names it, not a sentence that vanishes."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from batches import SMALL, SMALL_OPTIONS, sentences, task

from fairseq_lrn.models import DeepNMTModel, LRNModel
from fairseq_lrn.tasks.translation import LRNTranslationConfig, LRNTranslationTask

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]
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
    """From the fourth step on, of all hypotheses but the first sentence's first."""
    steps = []

    def hook(module, x, y):
        steps.append(1)
        if len(steps) > 3:
            y[1:] = torch.nan
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
    translation = LRNTranslationTask(
        LRNTranslationConfig(), task().source_dictionary, task().target_dictionary
    )
    options = {**options}
    allowed = options.pop("allowed", None)
    generator = translation.build_generator(
        [model],
        argparse.Namespace(beam=beam, max_len_b=12, **options),
        prefix_allowed_tokens_fn=allowed and (lambda sentence, tokens: list(allowed)),
    )
    one = 50 if change in (overflow, all_minus_infinity) else 51
    with pytest.raises(FloatingPointError, match=f"no translation of sentence {one} has a finite score"):
        translation.inference_step(generator, [model], sample)
    if change is nan_embedding and not allowed:
        rest = [0, 2, 3, 4]
        sample["net_input"] = {name: x[rest] for name, x in sample["net_input"].items()}
        found = translation.inference_step(generator, [model], sample)
        assert all(torch.isfinite(x["score"]) for beam in found for x in beam)


@pytest.fixture(scope="module")
def diverged(run, data, tmp_path_factory):
    """A checkpoint with a word whose embedding is NaN."""
    folder = tmp_path_factory.mktemp("diverged")
    run("fairseq-train", data, *PLUGIN, "--task", "lrn_translation", "--arch", "lrn_tiny", *SMALL_OPTIONS,
        "--optimizer", "adam", "--cpu", "--num-workers", 0, "--max-tokens", 400, "--max-update", 1,
        "--disable-validation", "--save-dir", folder)  # fmt: skip
    path = folder / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["encoder.embed_tokens.weight"][3] = torch.nan  # <unk>
    torch.save(state, path)
    return path


@pytest.fixture
def word(data):
    """A word of the dictionary."""
    return (data / "dict.en.txt").read_text(encoding="utf-8").split()[0]


def test_commands_name_the_sentence(run, data, diverged, word):
    out = run("fairseq-interactive", data, *PLUGIN, "--cpu", "--task", "lrn_translation", "--path", diverged,
              "--buffer-size", 3, "--batch-size", 3, "-s", "en", "-t", "de", "--max-len-b", 20,
              input=f"{word}\n☃\n{word} {word}\n", check=False)  # fmt: skip
    assert re.search(r"FloatingPointError: no translation of sentence \d has a finite score", out)
    assert "H-" not in out


def test_the_hub_names_the_sentence(data, diverged, word):
    hub = LRNModel.from_pretrained(
        diverged.parent, diverged.name, str(data), source_lang="en", target_lang="de"
    )
    with pytest.raises(FloatingPointError, match="no translation of sentence 1 has a finite score"):
        hub.translate([word, "☃"])
