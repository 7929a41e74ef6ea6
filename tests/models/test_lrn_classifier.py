"""The classifier: attentive pooling, features, heads."""

import pytest
import torch
from batches import DEVICES, sentences, task

from fairseq_lrn.models import LRNClassifierModel
from fairseq_lrn.models.word_encoder import WordEncoderConfig
from fairseq_lrn.modules import CELLS, AttentivePooling

SMALL = dict(encoder_embed_dim=6, encoder_hidden_size=5)
LENGTHS = [7, 3, 11, 1]


def build(device="cpu", **options):
    torch.manual_seed(0)
    model = LRNClassifierModel.build_model(WordEncoderConfig(**{**SMALL, **options}), task())
    model.register_classification_head("head", num_classes=3)
    return model.eval().to(device)


def test_pooling_is_its_definition():
    torch.manual_seed(0)
    pooling = AttentivePooling(4)
    x = torch.randn(6, 3, 4)
    padding_mask = torch.zeros(3, 6, dtype=torch.bool)
    padding_mask[1, 4:] = padding_mask[2, :5] = True
    pooled = pooling(x.masked_fill(padding_mask.t()[..., None], 1e4), padding_mask)
    for i in range(3):
        states = x[~padding_mask[i], i]
        scores = torch.tanh(states @ pooling.projection.weight.t() + pooling.projection.bias)
        weights = (scores @ pooling.query.weight[0]).exp()
        expected = (weights[:, None] * states).sum(0) / weights.sum()
        torch.testing.assert_close(pooled[i], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_mates_do_not_matter(cell, left, device):
    model = build(device, cell=cell)
    tokens = sentences(LENGTHS, model.encoder.padding_idx, left).to(device)
    features, _ = model(tokens)
    scores, _ = model(tokens, features_only=True, classification_head_name="head")
    assert features.shape == (4, 10)
    assert scores.shape == (4, 3)
    for i, n in enumerate(LENGTHS):
        alone = tokens[i : i + 1, slice(11 - n, None) if left else slice(n)]
        torch.testing.assert_close(model(alone)[0][0], features[i], rtol=1e-4, atol=1e-6)
        alone_scores, _ = model(alone, classification_head_name="head")
        torch.testing.assert_close(alone_scores[0], scores[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_learns(cell):
    model = build(cell=cell)
    model(sentences(LENGTHS, model.encoder.padding_idx), classification_head_name="head")[0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_characters_are_refused():
    with pytest.raises(ValueError, match="--char-embed-dim is 4, but must be 0"):
        build(char_embed_dim=4)
