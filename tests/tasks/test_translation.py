"""The task lrn_translation through fairseq's commands, and its hub interface: as fairseq's own translation.

tests/inference/test_generator.py has its generator in Python.
"""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import sacrebleu
import torch
from batches import SMALL_OPTIONS

import fairseq_lrn.tasks  # noqa: F401  registers lrn_translation
from fairseq_lrn.inference import COMPUTE_TYPES
from fairseq_lrn.models import LRNModel

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]
FIXED = "--cpu --num-workers 0 --required-batch-size-multiple 1".split()
EPOCHS = [4, 8, 12]


@pytest.fixture(scope="module")
def trained(run, data, tmp_path_factory):
    """A small model trained with the task, and validated by BLEU, on the same sentences; and its output."""
    folder = tmp_path_factory.mktemp("trained")
    for file in data.iterdir():
        if not file.name.startswith("valid."):
            (folder / file.name).symlink_to(file)
        if file.name.startswith("train."):
            (folder / file.name.replace("train.", "valid.")).symlink_to(file)
    out = run("fairseq-train", folder, *PLUGIN, *FIXED, "--task", "lrn_translation", "--arch", "lrn_tiny",
              *SMALL_OPTIONS, "--share-all-embeddings", "--optimizer", "adam", "--lr", "0.02", "--seed", 3,
              "--dropout", 0, "--max-tokens", 400, "--max-epoch", EPOCHS[-1], "--save-interval", EPOCHS[0],
              "--validate-interval", EPOCHS[0], "--eval-bleu", "--eval-bleu-args",
              '{"beam": 2, "max_len_b": 20}', "--eval-bleu-remove-bpe", "sentencepiece",
              "--log-format", "simple", "--save-dir", folder)  # fmt: skip
    return folder, out


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained[0] / "checkpoint_last.pt"


def test_validation_scores_what_fairseq_generate_scores(run, trained):
    """With the checkpoints of these epochs; one generator, built before training, validated them all."""
    folder, out = trained
    validated = [float(bleu) for bleu in re.findall(r"on 'valid' subset .* bleu (\S+)", out)]
    found = []
    for epoch in EPOCHS:
        out = run("fairseq-generate", folder, *PLUGIN, *FIXED, "--task", "lrn_translation",
                  "--path", folder / f"checkpoint{epoch}.pt", "--gen-subset", "valid", "--beam", 2,
                  "--max-len-b", 20, "--remove-bpe", "sentencepiece")  # fmt: skip
        hypotheses = re.findall(r"^H-\d+\t\S+\t(.*)$", out.replace("<unk>", "UNKNOWNTOKENINHYP"), re.M)
        references = re.findall(r"^T-\d+\t(.*)$", out.replace("<<unk>>", "UNKNOWNTOKENINREF"), re.M)
        found.append(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert validated == pytest.approx(found, abs=0.006)
    assert 0 < validated[0] < validated[1] < validated[2]


@pytest.mark.parametrize(
    "options",
    [
        "--beam 1 --max-len-a 0.5 --max-len-b 3",
        "--beam 4 --nbest 3 --lenpen 0.5 --min-len 4 --unkpen 2 --temperature 1.3",
        "--beam 3 --nbest 2 --print-alignment hard --left-pad-source",
        "--beam 2 --unnormalized --print-alignment soft",
        "--beam 3 --prefix-size 2",
        "--score-reference",
    ],
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
        for a, b in zip(re.split(r"[\t ,]", theirs), re.split(r"[\t ,]", ours)):
            assert a == b or abs(float(a) - float(b)) < 2e-4  # of scores, the last printed digit may differ


@pytest.mark.parametrize(
    "options", [[], ["--replace-unk", "words", "--unkpen", 100]], ids=["plain", "replace"]
)
def test_interactive_prints_the_same(run, data, checkpoint, test_sentences, options, tmp_path):
    """Every line in its turn, empty and unknown ones too; the hub interface as the command.

    fairseq's --replace-unk fails on a translation that holds <unk>, which --unkpen sees to.
    """
    (tmp_path / "words").write_text("a b\n")
    options = [tmp_path / "words" if word == "words" else word for word in options]
    lines = [*test_sentences, "", "☃ 12", test_sentences[0]]
    printed = []
    for name in ("translation", "lrn_translation"):
        out = run("fairseq-interactive", data, *PLUGIN, "--cpu", "--task", name, "--path", checkpoint,
                  "-s", "en", "-t", "de", "--beam", 3, "--max-len-b", 20, "--buffer-size", 9,
                  "--batch-size", 9, *options,
                  input="".join(f"{line}\n" for line in lines))  # fmt: skip
        printed.append(re.findall(r"^D-(\d+)\t\S+\t(.*)$", out, re.M))
    assert printed[0] == printed[1]
    assert [int(i) for i, _ in printed[1]] == list(range(len(lines)))
    if not options:
        hub = LRNModel.from_pretrained(checkpoint.parent, checkpoint.name, str(data))
        assert hub.translate(lines, beam=3, max_len_b=20) == [words for _, words in printed[1]]
        tokens = [hub.encode(line) for line in lines[:3]]
        assert len(hub.generate(tokens, 3, False, True)) == 3
        other = copy.deepcopy(hub.models[0])
        with torch.no_grad():
            other.decoder.output_projection.weight.neg_()
        hub.models[0] = other
        assert hub.translate(lines, beam=3, max_len_b=20) != [words for _, words in printed[1]]


def test_hub_interface_of_a_model_trained_with_the_task(run, data, checkpoint, tmp_path):
    """In a program that imports the model alone, as README.md has it."""
    (tmp_path / "program.py").write_text(
        "from fairseq_lrn.models import LRNModel\n"
        f"hub = LRNModel.from_pretrained({str(checkpoint.parent)!r}, {checkpoint.name!r}, {str(data)!r})\n"
        "print(len(hub.translate(['▁1', '', '▁3'])))\n"
    )
    assert run(tmp_path / "program.py").split()[-1] == "3"


def test_compute_types(run, data, checkpoint, test_sentences):
    """By the command and from Python the same; other scores than in float32."""
    found = {}
    for name in COMPUTE_TYPES:
        out = run("fairseq-interactive", data, *PLUGIN, "--cpu", "--task", "lrn_translation",
                  "--path", checkpoint, "-s", "en", "-t", "de", "--beam", 3, "--max-len-b", 20,
                  "--compute-type", name, "--buffer-size", 9, "--batch-size", 9,
                  input="".join(f"{line}\n" for line in test_sentences))  # fmt: skip
        found[name] = re.findall(r"^D-\d+\t(\S+)\t(.*)$", out, re.M)
        hub = LRNModel.from_pretrained(checkpoint.parent, checkpoint.name, str(data), compute_type=name)
        assert hub.translate(test_sentences, beam=3, max_len_b=20) == [words for _, words in found[name]]
    scores = [[float(score) for score, _ in found[name]] for name in COMPUTE_TYPES]
    assert scores[0] != scores[1] != scores[2] != scores[0]
    assert scores[1] == pytest.approx(scores[0], abs=0.1) and scores[2] == pytest.approx(scores[0], abs=0.5)


@pytest.mark.parametrize("name", COMPUTE_TYPES[1:])
def test_generate_with_a_compute_type(run, data, checkpoint, test_sentences, name):
    """In other batches than from Python, and nevertheless the same words with the same scores."""
    out = run("fairseq-generate", data, *PLUGIN, *FIXED, "--task", "lrn_translation", "--path", checkpoint,
              "--batch-size", 4, "--beam", 3, "--max-len-b", 20, "--compute-type", name)  # fmt: skip
    found = {int(i): (float(x), words) for i, x, words in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", out, re.M)}
    assert sorted(found) == list(range(len(test_sentences)))
    scores = {}
    hub = LRNModel.from_pretrained(checkpoint.parent, checkpoint.name, str(data))
    for kind in ("float32", name):
        hub.task.cfg.compute_type = kind
        tokens = [hub.encode(line) for line in test_sentences]
        best = [beam[0] for beam in hub.generate(tokens, beam=3, max_len_b=20)]
        scores[kind] = [x["score"].item() / math.log(2) for x in best]
    assert [found[i][1] for i in sorted(found)] == [hub.string(x["tokens"]) for x in best]
    assert [found[i][0] for i in sorted(found)] == pytest.approx(scores[name], rel=1e-6)
    assert scores["float32"] != pytest.approx(scores[name], rel=1e-6)


def test_compute_types_of_a_model_trained_with_another_task(data, checkpoint):
    """With ``translation`` it gets ours, unless that task is named."""
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["task"]["_name"] = "translation"
    del state["cfg"]["task"]["compute_type"]
    torch.save(state, checkpoint.parent / "translation.pt")
    load = functools.partial(LRNModel.from_pretrained, checkpoint.parent, "translation.pt", str(data))
    assert load(compute_type="int8").task.cfg.compute_type == "int8"
    assert load().task.cfg.compute_type == "float32"
    with pytest.raises(ValueError, match="is 'int4', but must be one of float32, bfloat16, int8"):
        load(compute_type="int4")
    with pytest.raises(ValueError, match="needs the task lrn_translation, but the task is a TranslationTask"):
        load(compute_type="int8", task="translation")
