"""The lrn model through fairseq's own commands, on a small slice of real translations."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import SMALL_OPTIONS

from fairseq_lrn.modules import CELLS

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]
# 8, fairseq's default --required-batch-size-multiple, divides neither the training nor the test sentences
TRAIN = (
    "--arch lrn_tiny --optimizer adam --lr 0.005 --criterion label_smoothed_cross_entropy "
    "--label-smoothing 0.1 --max-tokens 400 --required-batch-size-multiple 1 --cpu --num-workers 0 "
    "--seed 3 --log-format simple --log-interval 1"
).split()


@pytest.fixture(scope="module")
def checkpoint(run, data, tmp_path_factory):
    """A small model after twelve updates."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run("fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, "--share-all-embeddings", "--max-update", 12,
        "--save-dir", folder)  # fmt: skip
    return folder / "checkpoint_last.pt"


def generate(run, data, checkpoint, *options):
    """Translate the test set; returns the command's output and {sentence: (score, pieces)}."""
    fixed = "--cpu --beam 3 --max-len-b 20 --num-workers 0 --required-batch-size-multiple 1".split()
    out = run("fairseq-generate", data, *PLUGIN, "--path", checkpoint, *fixed, *options)
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", out, re.M)
    return out, {int(i): (float(score), words) for i, score, words in found}


def weights(checkpoint):
    # the plugin allows what a checkpoint of fairseq's holds
    import fairseq_lrn.models  # noqa: F401

    return torch.load(checkpoint, weights_only=True)["model"]


def test_every_sentence_is_translated(run, data, checkpoint, test_sentences):
    _, hypotheses = generate(run, data, checkpoint)
    assert len(test_sentences) % 8 != 0
    assert sorted(hypotheses) == list(range(len(test_sentences)))


@pytest.mark.parametrize("side", [[], ["--left-pad-source"]], ids=["left", "right"])
def test_translation_does_not_depend_on_the_batch(run, data, checkpoint, side):
    """fairseq pads sources on the left; its flag --left-pad-source, true by default, turns that off."""
    _, alone = generate(run, data, checkpoint, *side, "--batch-size", 1)
    _, together = generate(run, data, checkpoint, *side, "--batch-size", 64)
    assert {i: words for i, (_, words) in alone.items()} == {i: words for i, (_, words) in together.items()}
    assert [alone[i][0] for i in alone] == pytest.approx([together[i][0] for i in alone], abs=2e-4)


def test_search_scores_a_translation_as_teacher_forcing_does(run, data, checkpoint):
    """--score-reference runs whole sentences, a search forced along the reference one word at a time."""
    _, whole = generate(run, data, checkpoint, "--score-reference")
    _, stepwise = generate(run, data, checkpoint, "--prefix-size", 200, "--beam", 1, "--max-len-b", 200)
    same = [i for i in whole if whole[i][1] == stepwise[i][1]]
    assert len(same) > len(whole) / 2
    assert [whole[i][0] for i in same] == pytest.approx([stepwise[i][0] for i in same], abs=2e-4)


def test_every_word_is_aligned(run, data, checkpoint, test_sentences):
    out, _ = generate(run, data, checkpoint, "--print-alignment")
    sources = dict(re.findall(r"^S-(\d+)\t(.*)$", out, re.M))
    aligned = dict(re.findall(r"^A-(\d+)\t(.*)$", out, re.M))
    assert sorted(map(int, aligned)) == list(range(len(test_sentences)))
    for i, pairs in aligned.items():
        points = [tuple(map(int, pair.split("-"))) for pair in pairs.split()]
        assert [target for _, target in points] == list(range(len(points)))
        assert all(0 <= source < len(sources[i].split()) for source, _ in points)


def test_interactive_answers_every_line_in_order(run, data, checkpoint, test_sentences, tmp_path):
    """--replace-unk changes nothing where no <unk> is translated to, which --unkpen sees to."""
    lines = test_sentences[:5]
    command = ["fairseq-interactive", data, *PLUGIN, "--path", checkpoint, "--cpu", "--buffer-size", 3]
    text = "\n".join(lines) + "\n"
    out = run(*command, "--batch-size", 3, "--unkpen", 100, input=text)
    assert re.findall(r"^H-(\d+)\t", out, re.M) == list("01234")
    for line, echo in zip(lines, re.findall(r"^S-\d+\t(.*)$", out, re.M)):
        assert all(b in (a, "<unk>") for a, b in zip(line.split(), echo.split()))
    (tmp_path / "words").write_text("a b\n")
    replaced = run(
        *command, "--batch-size", 3, "--unkpen", 100, "--replace-unk", tmp_path / "words", input=text
    )
    assert re.findall(r"^H-.*$", replaced, re.M) == re.findall(r"^H-.*$", out, re.M)


def test_resuming_after_kill_9_reaches_the_same_weights(run, data, tmp_path):
    """A run killed in the middle of an epoch and started again ends with an undisturbed one's weights."""
    command = ["fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, "--dropout", 0.3,
               "--save-interval-updates", 3, "--max-update", 10]  # fmt: skip
    run(*command, "--save-dir", tmp_path / "undisturbed")

    words = [
        str(Path(sys.executable).parent / command[0]),
        *map(str, command[1:]),
        "--save-dir",
        str(tmp_path / "killed"),
    ]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        for line in process.stdout:
            if "num_updates=5" in line:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("checkpoint_*_9.pt"))
    out = run(*command, "--save-dir", tmp_path / "killed")
    assert "Loaded checkpoint" in out

    whole = weights(tmp_path / "undisturbed" / "checkpoint_last.pt")
    resumed = weights(tmp_path / "killed" / "checkpoint_last.pt")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("cell", CELLS[1:])
def test_every_other_unit_trains_and_translates(run, data, tmp_path, test_sentences, cell):
    run(
        "fairseq-train",
        data,
        *PLUGIN,
        *TRAIN,
        *SMALL_OPTIONS,
        "--cell",
        cell,
        "--max-update",
        2,
        "--save-dir",
        tmp_path,
    )
    _, hypotheses = generate(run, data, tmp_path / "checkpoint_last.pt")
    assert sorted(hypotheses) == list(range(len(test_sentences)))


def test_adaptive_softmax_trains(run, data, tmp_path):
    options = [word for word in TRAIN if word not in ("--label-smoothing", "0.1")]
    options[options.index("label_smoothed_cross_entropy")] = "adaptive_loss"
    options += ["--adaptive-softmax-cutoff", "20,40", "--ddp-backend", "legacy_ddp", "--max-update", 2]
    out = run("fairseq-train", data, *PLUGIN, *options, *SMALL_OPTIONS, "--save-dir", tmp_path)
    assert "num_updates=2" in out
    _, hypotheses = generate(run, data, tmp_path / "checkpoint_last.pt")
    assert hypotheses


def test_a_pruned_model_trains_on(run, data, checkpoint, tmp_path):
    """Its checkpoint is of the smaller model, to translate with."""
    kept = [
        "--encoder-layers-to-keep",
        "1",
        "--decoder-layers-to-keep",
        "0",
        "--finetune-from-model",
        checkpoint,
    ]
    train = ["fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, "--share-all-embeddings", "--lr", 0]
    run(*train, *kept, "--max-update", 1, "--save-dir", tmp_path)
    pruned = tmp_path / "checkpoint_last.pt"
    before, after = weights(checkpoint), weights(pruned)
    name = "layers.{}.final_layer_norm.weight"
    for side, layer in (("encoder", 1), ("decoder", 0)):
        assert torch.equal(after[f"{side}.{name.format(0)}"], before[f"{side}.{name.format(layer)}"])
        assert f"{side}.{name.format(1)}" not in after
    generate(run, data, pruned)


def test_long_sentences_are_refused_or_skipped_by_max_source_positions(run, data, tmp_path):
    command = ["fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, "--max-update", 1,
               "--max-source-positions", 6, "--save-dir", tmp_path]  # fmt: skip
    assert "since max_positions=(6, 1024)" in run(*command, check=False)
    assert "samples have invalid sizes and will be skipped" in run(
        *command, "--skip-invalid-size-inputs-valid-test"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--decoder-attention-heads", 3], "must be a multiple of --decoder-attention-heads, 3"),
        (["--share-all-embeddings", "--encoder-embed-dim", 12], "to match --decoder-embed-dim"),
    ],
)
def test_errors_reach_the_command_line(run, data, tmp_path, options, words):
    out = run(
        "fairseq-train", data, *PLUGIN, *TRAIN, *SMALL_OPTIONS, *options, "--save-dir", tmp_path, check=False
    )
    assert words in out.splitlines()[-1]


def test_user_dir_is_printed():
    printed = subprocess.run(
        [sys.executable, "-m", "fairseq_lrn"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    assert Path(printed, "models", "lrn.py").is_file()
