"""The tagger against its definition: all sequences of tags, counted out."""

import itertools
import sys
import types

import pytest
import torch
from batches import DEVICES, dictionary

from fairseq_lrn.models import LRNTaggerModel
from fairseq_lrn.models.word_encoder import WordEncoderConfig
from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.words import collate, encode_chars

SMALL = dict(encoder_embed_dim=8, encoder_hidden_size=6, char_embed_dim=4, dropout=0.3)
WORDS, TAGS = dictionary(), dictionary(3, "t")
LENGTH = 5


def build(device="cpu", **options):
    torch.manual_seed(1)
    task = types.SimpleNamespace(
        source_dictionary=WORDS,
        target_dictionary=TAGS,
        cfg=types.SimpleNamespace(max_word_length=LENGTH),
    )
    model = LRNTaggerModel.build_model(WordEncoderConfig(**{**SMALL, **options}), task)
    return model.to(device).eval()


def batch(lengths, device="cpu", seed=1):
    """Sentences of random words and random tags."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(4, len(WORDS), (n,), generator=generator) for n in lengths]
    tags = [torch.randint(4, len(TAGS), (n,), generator=generator) for n in lengths]
    chars = [encode_chars([WORDS[i] for i in ids.tolist()], LENGTH) for ids in words]
    return {
        "net_input": {
            "src_tokens": collate(words, WORDS.pad()).to(device),
            "src_lengths": torch.tensor(lengths, device=device),
            "src_chars": collate(chars, 0).to(device),
        },
        "target": collate(tags, TAGS.pad()).to(device),
    }


def take(sample, i, n):
    """Sentence ``i`` of a batch, of ``n`` words, alone."""
    net_input = sample["net_input"]
    return {
        "net_input": {
            "src_tokens": net_input["src_tokens"][i : i + 1, :n],
            "src_lengths": net_input["src_lengths"][i : i + 1],
            "src_chars": net_input["src_chars"][i : i + 1, :n],
        },
        "target": sample["target"][i : i + 1, :n],
    }


def every_path(model, sample):
    """Log-probability of each sequence of tags of one sentence, by its definition."""
    crf = model.crf
    emissions = model(**sample["net_input"])["emissions"][0]
    scores = {}
    for path in itertools.product(range(3), repeat=len(emissions)):
        score = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
        score = score + sum(emissions[t, tag] for t, tag in enumerate(path))
        scores[path] = score + sum(crf.transitions[pair] for pair in zip(path, path[1:]))
    total = torch.stack(list(scores.values())).logsumexp(0)
    return {path: float(score - total) for path, score in scores.items()}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_loss_and_decoding_against_all_paths(length):
    model, sample = build(), batch([length])
    paths = every_path(model, sample)
    net_output = model(**sample["net_input"])
    target = tuple((sample["target"][0] - TAGS.nspecial).tolist())
    assert float(model.get_losses(net_output, sample)["nll"]) == pytest.approx(-paths[target], abs=1e-5)
    ((tags, score),) = model.decode(net_output)
    best = max(paths, key=paths.get)
    assert [TAGS[i] for i in tags.tolist()] == [f"t{tag}" for tag in best]
    assert float(score) == pytest.approx(paths[best], abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_batch_mates_do_not_matter(cell, device):
    model, lengths = build(device, cell=cell), [4, 1, 7, 2]
    sample = batch(lengths, device)
    net_output = model(**sample["net_input"])
    assert int(net_output["sample_size"]) == sum(lengths)
    decoded, losses = model.decode(net_output), 0.0
    for i, n in enumerate(lengths):
        alone = take(sample, i, n)
        out = model(**alone["net_input"])
        torch.testing.assert_close(net_output["emissions"][i, :n], out["emissions"][0], rtol=1e-4, atol=1e-5)
        losses += float(model.get_losses(out, alone)["nll"])
        ((tags, score),) = model.decode(out)
        assert decoded[i][0].tolist() == tags.tolist()
        assert float(decoded[i][1]) == pytest.approx(float(score), abs=1e-4)
    assert float(model.get_losses(net_output, sample)["nll"]) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_every_unit_learns(cell):
    """Each parameter gets a gradient, and the loss of one batch falls."""
    model, sample = build(cell=cell, dropout=0.0), batch([4, 1, 7, 2])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(15):
        loss = model.get_losses(model(**sample["net_input"]), sample)["nll"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_sentences_of_one_word_leave_no_parameter_without_gradient():
    model, sample = build(), batch([1, 1])
    model.get_losses(model(**sample["net_input"]), sample)["nll"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_sum_over_a_sentence_in_float32(dtype):
    model, sample = build(), batch([120, 50])
    model.crf.to(dtype)
    generator = torch.Generator().manual_seed(1)
    emissions = (4 * torch.randn(2, 120, 3, generator=generator)).to(dtype)
    results = []
    for wide in (False, True):
        if wide:
            model.crf.float()
        x = emissions.float() if wide else emissions
        x = x.detach().requires_grad_()
        net_output = {"emissions": x, "mask": sample["net_input"]["src_tokens"].ne(WORDS.pad())}
        loss = model.get_losses(net_output, sample)["nll"]
        (gradient,) = torch.autograd.grad(loss, x)
        tags, scores = zip(*model.decode(net_output))
        results.append((loss, gradient.to(dtype).float(), tags, scores))
    torch.testing.assert_close(*results)


def test_words_alone():
    model, sample = build(char_embed_dim=0), batch([3, 2])
    del sample["net_input"]["src_chars"]
    assert model(**sample["net_input"])["emissions"].shape == (2, 3, 3)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcrf", None)
    with pytest.raises(ImportError, match="pip install pytorch-crf"):
        build()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"encoder_hidden_size": 0}, "--encoder-hidden-size is 0, but must be positive"),
        ({"cell": "gru", "cell_activation": "identity"}, "--cell-activation identity is for lrn and olrn"),
    ],
)
def test_clear_errors(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)
