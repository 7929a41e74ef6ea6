"""The deepnmt model with each of its units, and through fairseq's commands."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from batches import (
    DEVICES,
    assert_batch_mates_do_not_matter,
    assert_beams_share_their_sentence,
    assert_left_padded_target_gives_the_same_scores,
    dictionary,
    sentences,
    task,
)
from fairseq.models import ARCH_CONFIG_REGISTRY

from fairseq_lrn.models import DeepNMTModel
from fairseq_lrn.models.deepnmt import DeepNMTConfig
from fairseq_lrn.models.deepnmt_encoder import ContextAwareRecurrent
from fairseq_lrn.modules import CELLS

ROOT = Path(__file__).resolve().parents[2]
every_cell = pytest.mark.parametrize("cell", CELLS)
each_device = pytest.mark.parametrize("device", DEVICES)
FORMS = [{}, {"context_aware_encoder": True, "attention": "dot", "layer_norm": True}]
each_form = pytest.mark.parametrize("form", FORMS, ids=["bidirectional", "context-aware"])


def build(device="cpu", **options):
    torch.manual_seed(0)
    sizes = {"encoder_embed_dim": 12, "decoder_embed_dim": 16, "encoder_layers": 3, "decoder_layers": 2}
    config = DeepNMTConfig(**sizes, decoder_attention_heads=2, **options)
    return DeepNMTModel.build_model(config, task()).to(device).eval()


@every_cell
@each_form
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@each_device
def test_batch_mates_do_not_matter(device, left, form, cell):
    model = build(device, cell=cell, **form)
    assert_batch_mates_do_not_matter(model, left)


@every_cell
def test_left_padded_target_gives_the_same_scores(cell):
    assert_left_padded_target_gives_the_same_scores(build(cell=cell))


@every_cell
@each_form
@each_device
def test_incremental_decoding_equals_teacher_forcing(device, form, cell):
    """Also after a reordering, when every hypothesis goes on from the state of the one it was made from."""
    model = build(device, cell=cell, **form)
    pad = model.encoder.padding_idx
    source = sentences([5, 9, 2], pad, left=True).to(device)
    target = sentences([8, 8, 8], pad, seed=2).to(device)
    encoder_out, state = model.encoder(source), {}
    for t in range(target.size(1)):
        if t == 4:
            order = torch.tensor([2, 0], device=device)
            model.decoder.reorder_incremental_state_scripting(state, order)
            encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
            source, target = source[order], target[order]
        step, _ = model.decoder(target[:, : t + 1], encoder_out, incremental_state=state)
        whole, _ = model(source, None, target[:, : t + 1])
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=0, atol=1e-5)


@every_cell
@each_form
@each_device
def test_beams_share_their_sentence(device, form, cell):
    assert_beams_share_their_sentence(build(device, cell=cell, **form))


@every_cell
@each_form
def test_every_parameter_learns(form, cell):
    model = build(cell=cell, **form).train()
    source = sentences([5, 9], model.encoder.padding_idx)
    model(source, None, source)[0].logsumexp(2).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@every_cell
def test_context_aware_layer(cell):
    """It reads the source, then the other direction's state, step by step against time."""
    torch.manual_seed(0)
    layer = ContextAwareRecurrent(cell, 5, "tanh").double()
    x = torch.randn(6, 2, 5).double()
    context, _ = layer.context(x)
    state, expected = x.new_zeros(2, layer.second.state_size), [None] * 6
    for t in reversed(range(6)):
        _, state = layer.first.step(layer.first.project(x[t]), state)
        expected[t], state = layer.second.step(layer.second.project(context[t]), state)
    output, last = layer(x, None, None)
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close(last[0], state)


@pytest.mark.parametrize(
    ("cell", "millions"), [("lrn", 143), ("olrn", 164), ("gru", 206), ("atr", 122), ("sru", 170)]
)
def test_parameters_at_paper_scale(cell, millions):
    """Within 7 % of the paper's, for a vocabulary of 32,000; README.md says where they differ."""
    args = argparse.Namespace(cell=cell)
    ARCH_CONFIG_REGISTRY["deepnmt_wmt_en_de"](args)
    words = dictionary(32_000 - 4)
    with torch.device("meta"):
        model = DeepNMTModel.build_model(DeepNMTConfig.from_namespace(args), task(words))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=0.07)


@pytest.mark.parametrize("cell", ["lrn", "lstm"])
def test_trains_and_translates(run, data, tmp_path, test_sentences, cell):
    plugin = ["--user-dir", ROOT / "fairseq_lrn"]
    options = (
        "--arch deepnmt_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --context-aware-encoder "
        "--layer-norm --optimizer adam --lr 0.005 --max-tokens 400 --required-batch-size-multiple 1 "
        "--max-update 4 --cpu --num-workers 0 --log-format simple --log-interval 1"
    ).split()
    output = run("fairseq-train", data, *plugin, *options, "--cell", cell, "--save-dir", tmp_path)
    losses = [float(loss) for loss in re.findall(r"train_inner .* loss=([0-9.]+)", output)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    search = "--cpu --beam 3 --max-len-b 20 --num-workers 0 --required-batch-size-multiple 1".split()
    output = run("fairseq-generate", data, *plugin, "--path", tmp_path / "checkpoint_last.pt", *search)
    assert sorted(map(int, re.findall(r"^H-(\d+)\t", output, re.M))) == list(range(len(test_sentences)))
