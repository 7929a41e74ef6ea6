"""Training with alignments, as fairseq's transformer_align trains, through fairseq's commands."""

import re
from pathlib import Path

import pytest
import torch
from batches import SMALL, SMALL_OPTIONS, sentences, task
from fairseq.criterions.label_smoothed_cross_entropy_with_alignment import (
    LabelSmoothedCrossEntropyCriterionWithAlignment,
)

from fairseq_lrn.models import LRNModel
from fairseq_lrn.models.lrn import LRNConfig

PLUGIN = ["--user-dir", Path(__file__).resolve().parents[2] / "fairseq_lrn"]


@pytest.fixture(scope="module")
def aligned(run, corpus, tmp_path_factory):
    """The corpus with alignments: of each target word with the source word in its place, or the last one."""
    texts = tmp_path_factory.mktemp("aligned")
    for name in ("train", "valid", "test"):
        pairs = [
            (corpus / f"{name}.{language}").read_text(encoding="utf-8").splitlines()
            for language in ("en", "de")
        ]
        for language, lines in zip(("en", "de"), pairs):
            (texts / f"{name}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        points = (
            " ".join(f"{min(i, len(a.split()) - 1)}-{i}" for i in range(len(b.split())))
            for a, b in zip(*pairs)
        )
        (texts / f"{name}.align").write_text("\n".join(points) + "\n")
    data = tmp_path_factory.mktemp("aligned-data")
    prefixes = [f"--{name}pref={texts / name}" for name in ("train", "valid", "test")]
    run("fairseq-preprocess", "-s", "en", "-t", "de", "--joined-dictionary", *prefixes, "--align-suffix",
        "align", "--destdir", data)  # fmt: skip
    return data


def train(run, data, folder, *options, check=True):
    words = (
        "--load-alignments --criterion label_smoothed_cross_entropy_with_alignment --alignment-lambda 2 "
        "--label-smoothing 0.1 --optimizer adam --lr 0.01 --max-tokens 400 --cpu --num-workers 0 --seed 1 "
        "--log-format simple --log-interval 1 --dropout 0"
    ).split()
    return run("fairseq-train", data, *PLUGIN, *words, *options, "--save-dir", folder, check=check)


@pytest.mark.parametrize(
    "model",
    [
        [*SMALL_OPTIONS, "--arch", "lrn_tiny"],
        [*SMALL_OPTIONS, "--arch", "lrn_tiny", "--alignment-layer", 0, "--alignment-heads", 1],
        "--arch deepnmt_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-layers 2 "
        "--decoder-layers 2 --decoder-attention-heads 2 --alignment-heads 1".split(),
    ],
    ids=["lrn", "lrn's first layer and head", "deepnmt"],
)
def test_alignments_are_learnt(run, aligned, tmp_path, model):
    out = train(run, aligned, tmp_path, *model, "--max-update", 60, "--validate-interval", 100)
    losses = [float(x) for x in re.findall(r"train_inner .* alignment_loss=([0-9.]+)", out)]
    assert len(losses) == 60, out[-3000:]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    found = []
    for task_name in ("translation", "lrn_translation"):
        out = run(
            "fairseq-generate", aligned, *PLUGIN, "--task", task_name,
            "--path", tmp_path / "checkpoint_last.pt", "--cpu", "--beam", 2, "--max-len-b", 15,
            "--print-alignment",
        )  # fmt: skip
        lines = dict(re.findall(r"^A-(\d+)\t(.*)$", out, re.M))
        sources = dict(re.findall(r"^S-(\d+)\t(.*)$", out, re.M))
        assert sorted(lines) == sorted(sources)
        found.append(lines)
    assert found[0] == found[1]
    for line in lines.values():
        assert [int(pair.split("-")[1]) for pair in line.split()] == list(range(len(line.split())))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--alignment-layer", 2], "ValueError: --alignment-layer is 2, but must be from 0 to 1"),
        (["--alignment-layer", -1], "ValueError: --alignment-layer is -1, but must be from 0 to 1"),
        (["--alignment-heads", 3], "ValueError: --alignment-heads is 3, but must be from 1 to"),
        (["--alignment-heads", 0], "ValueError: --alignment-heads is 0, but must be from 1 to"),
        (["--decoder-layerdrop", 0.1], "ValueError: --decoder-layerdrop is 0.1, but must be 0 with --load"),
    ],
    ids=str,
)
def test_what_cannot_be_aligned(run, aligned, tmp_path, options, words):
    assert words in train(run, aligned, tmp_path, "--arch", "lrn_tiny", *SMALL_OPTIONS, *options, check=False)


def build(load_alignments, **options):
    torch.manual_seed(0)
    made = task()
    made.cfg = type("Config", (), {"load_alignments": load_alignments})
    return LRNModel.build_model(LRNConfig(**SMALL, dropout=0.0, word_dropout=0.0, **options), made).train()


def test_attention_in_training_is_that_of_evaluation():
    source, target = sentences([5, 9], 1, left=True), sentences([6, 4], 1, seed=2)
    model = build(True, alignment_layer=0, alignment_heads=1)
    scores, extra = model(source, None, target)
    eval_scores, eval_extra = model.eval()(source, None, target)
    torch.testing.assert_close(scores, eval_scores)
    torch.testing.assert_close(extra["attn"], eval_extra["attn"])
    asked = model(source, None, target, alignment_layer=1, alignment_heads=2)[1]["attn"][0]
    assert (asked - extra["attn"][0]).abs().max() > 1e-3
    plain = build(False)
    assert plain(source, None, target)[1]["attn"] == [None]
    assert plain(source, None, target, alignment_layer=1)[1]["attn"][0].shape == (2, 6, 9)


def test_the_loss_reaches_the_keys_and_queries_of_that_layer():
    """As fairseq's criterion computes it."""
    model = build(True, alignment_layer=0)
    source, target = sentences([5, 9], 1, left=True), sentences([6, 4], 1, seed=2)
    net_output = model(source, None, target)
    points = torch.tensor([[4, 0], [5, 1], [3, 6]])  # of the flattened batch: source, target
    sample = {"alignments": points, "align_weights": torch.ones(3)}
    loss = LabelSmoothedCrossEntropyCriterionWithAlignment.compute_alignment_loss(None, sample, net_output)
    loss.backward()
    assert torch.isfinite(loss)
    first, last = (layer.encoder_attn.q_proj.weight.grad for layer in model.decoder.layers)
    assert first.abs().sum() > 0 and last is None
