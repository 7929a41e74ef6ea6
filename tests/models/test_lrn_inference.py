"""The model for sentence pairs: splitting them, attention between them, features."""

import pytest
import torch
from batches import DEVICES, sentences, task

from fairseq_lrn.models import LRNInferenceModel
from fairseq_lrn.models.lrn_inference import LRNInferenceConfig, attend_to_other, split_pairs
from fairseq_lrn.modules import CELLS

SMALL = dict(encoder_embed_dim=6, encoder_hidden_size=5)
# of both sentences, </s> included: one that is nothing else is empty
LENGTHS = [(4, 3), (1, 5), (6, 1), (1, 1), (2, 6)]
PAD, EOS = 1, 2


def build(device="cpu", **options):
    torch.manual_seed(0)
    model = LRNInferenceModel.build_model(LRNInferenceConfig(**{**SMALL, **options}), task())
    model.register_classification_head("head", num_classes=3)
    return model.eval().to(device)


def pairs(left=False):
    """Pairs (B, T), and their sentences one by one."""
    first, second = (sentences([n[i] for n in LENGTHS], PAD, seed=i) for i in range(2))
    single = [(a[a != PAD], b[b != PAD]) for a, b in zip(first, second)]
    batch = torch.full((len(LENGTHS), max(map(sum, LENGTHS))), PAD)
    for row, pair in zip(batch, single):
        joined = torch.cat(pair)
        row[len(row) - len(joined) if left else 0 :][: len(joined)] = joined
    return batch, single


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_pairs_are_split_after_the_first_end(left):
    batch, single = pairs(left)
    split = split_pairs(batch, EOS, PAD)
    assert split.shape == (10, 6)
    for row, sentence in zip(split, [a for a, _ in single] + [b for _, b in single]):
        assert torch.equal(row[: len(sentence)], sentence)
        assert row[len(sentence) :].eq(PAD).all()


@pytest.mark.parametrize("row", [[5, 6, EOS, PAD], [5, 6, 7, 8]], ids=["one sentence", "no end"])
def test_one_sentence_is_refused(row):
    pair = [5, EOS, 7, EOS]
    with pytest.raises(ValueError, match="row 1 of src_tokens is one sentence, but must be two"):
        build()(torch.tensor([pair, row, pair]))


def test_attention_is_its_definition():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 4)
    padding_mask = torch.zeros(6, 5, dtype=torch.bool)
    padding_mask[1, 2:] = padding_mask[3, 4:] = padding_mask[5, 1:] = True
    found = attend_to_other(x.masked_fill(padding_mask.t()[..., None], 1e4), padding_mask)
    for i, other in enumerate([3, 4, 5, 0, 1, 2]):
        states, memory = x[~padding_mask[i], i], x[~padding_mask[other], other]
        expected = (states @ memory.t()).softmax(1) @ memory
        torch.testing.assert_close(found[~padding_mask[i], i], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_mates_do_not_matter(cell, left, device):
    model = build(device, cell=cell)
    batch, single = pairs(left)
    features, _ = model(batch.to(device))
    scores, _ = model(batch.to(device), features_only=True, classification_head_name="head")
    assert features.shape == (5, 20)
    assert scores.shape == (5, 3)
    for i, pair in enumerate(single):
        alone = torch.cat(pair)[None].to(device)
        torch.testing.assert_close(model(alone)[0][0], features[i], rtol=1e-4, atol=1e-6)


def test_each_sentence_is_read_beside_the_other():
    """The halves of the features are the two sentences', and each depends on both."""
    model = build()
    first, second = torch.tensor([5, 6, EOS]), torch.tensor([7, 8, 9, EOS])
    features = model(torch.cat([first, second])[None])[0]
    swapped = model(torch.cat([second, first])[None])[0]
    torch.testing.assert_close(torch.cat(swapped.chunk(2, 1)[::-1], 1), features)
    for changed in (torch.tensor([5, 10, EOS, 7, 8, 9, EOS]), torch.tensor([5, 6, EOS, 7, 8, 10, EOS])):
        for half in (model(changed[None])[0] - features).chunk(2, 1):
            assert half.abs().max() > 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_learns(cell):
    model = build(cell=cell)
    model(pairs()[0], classification_head_name="head")[0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_layers_must_be_positive():
    with pytest.raises(ValueError, match="--comparison-layers is 0, but must be positive"):
        build(comparison_layers=0)


def test_characters_are_refused():
    with pytest.raises(ValueError, match="--char-embed-dim is 4, but must be 0"):
        build(char_embed_dim=4)
