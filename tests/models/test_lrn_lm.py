"""The language model in Python: dropout, mixture of softmaxes, incremental decoding, the carried state."""

import types

import pytest
import torch
from batches import DEVICES, dictionary, sentences
from fairseq.data import TruncatedDictionary

from fairseq_lrn.models import LRNLanguageModel
from fairseq_lrn.models.lrn_lm import LRNLanguageModelConfig
from fairseq_lrn.modules import CELLS, MixtureOfSoftmaxes

SIZES = dict(decoder_embed_dim=12, decoder_hidden_size=16, decoder_layers=2)


def build(target=None, device="cpu", **options):
    torch.manual_seed(5)
    words = dictionary()
    task = types.SimpleNamespace(source_dictionary=words, target_dictionary=target or words)
    cfg = LRNLanguageModelConfig(**{**SIZES, **options})
    return LRNLanguageModel.build_model(cfg, task).to(device).eval()


def log_probs(model, *args, **kwargs):
    return model.get_normalized_probs(model(*args, **kwargs), log_probs=True)


def text(rows=3, length=12, device="cpu", seed=1):
    return sentences([length] * rows, 1, seed=seed).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_blocks_with_the_state_carried_are_one_text(cell, device):
    model, tokens = build(cell=cell, device=device), text(device=device)
    whole = model(tokens)[0]
    blocks = [model(part, block=i)[0] for i, part in enumerate(tokens.split([5, 1, 6], 1))]
    torch.testing.assert_close(torch.cat(blocks, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens, block=0)[0], whole)  # begins with zeros again
    assert not torch.allclose(model(tokens[:, 5:])[0], whole[:, 5:], atol=1e-3)


def test_streams_end_from_the_last_row_on():
    model, tokens = build(), text()
    whole = model(tokens)[0]
    model(tokens[:, :5], block=0)
    torch.testing.assert_close(model(tokens[:2, 5:], block=1)[0], whole[:2, 5:], rtol=1e-5, atol=1e-5)


def test_only_the_block_before_in_the_same_mode_is_carried_on():
    model, tokens = build(dropout=0.0), text()
    whole, alone = model(tokens)[0][:, 5:], model(tokens[:, 5:])[0]
    torch.testing.assert_close(model(tokens[:, 5:], block=1)[0], alone)  # nothing was read before
    model.train()(tokens[:, :5], block=0)
    torch.testing.assert_close(model.eval()(tokens[:, 5:], block=1)[0], alone)  # training has its own state
    torch.testing.assert_close(model.train()(tokens[:, 5:], block=1)[0], whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens[:, 5:], block=1)[0], whole, rtol=1e-5, atol=1e-5)  # once more
    torch.testing.assert_close(model(tokens[:, 5:], block=3)[0], alone)  # block 2 was not read
    torch.testing.assert_close(model(tokens[:, 5:])[0], alone)


def test_no_gradient_flows_into_the_block_before():
    model = build().train()
    model(text(), block=0)
    embedded = model.decoder.embed_tokens.weight
    scores = model(text(seed=2), block=1)[0]
    (gradient,) = torch.autograd.grad(scores.sum(), embedded)
    only_first = torch.tensor(sorted(set(text().flatten().tolist()) - set(text(seed=2).flatten().tolist())))
    assert len(only_first) > 0
    assert gradient[only_first].eq(0).all()


@pytest.mark.parametrize("options", [{}, {"mixture_of_softmaxes": 3}], ids=["softmax", "mixture"])
@pytest.mark.parametrize("cell", CELLS)
def test_word_by_word_with_the_beam_is_teacher_forcing(cell, options):
    model, tokens, order = build(cell=cell, **options), text(), torch.tensor([2, 0, 0])
    whole = model(tokens)[0]
    state = {}
    for t in range(tokens.size(1)):
        if t == 6:
            model.decoder.reorder_incremental_state(state, order)
            tokens, whole = tokens[order], whole[order]
        step = model.decoder(tokens[:, : t + 1], incremental_state=state)[0]
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_and_batch_mates_change_nothing(cell):
    model, lengths = build(cell=cell), [7, 3, 11, 1]
    tokens = sentences(lengths, 1)
    scores = model(tokens)[0]
    for row, n, found in zip(tokens, lengths, scores):
        torch.testing.assert_close(model(row[None, :n])[0][0], found[:n], rtol=1e-5, atol=1e-5)


def test_mixture_is_its_definition():
    torch.manual_seed(6)
    output = torch.nn.Linear(5, 11, bias=False)
    mixture, x = MixtureOfSoftmaxes(7, 3, output), torch.randn(2, 4, 7)
    prior = mixture.prior(x).softmax(-1)
    latent = mixture.latent(x).tanh().chunk(3, -1)
    expected = sum(prior[..., k, None] * output(latent[k]).softmax(-1) for k in range(3))
    torch.testing.assert_close(mixture(x).exp(), expected)
    assert len({id(parameter) for parameter in mixture.parameters()}) == 4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hidden", [12, 16])
def test_normalized_probabilities_of_the_mixture(shared, hidden):
    model = build(mixture_of_softmaxes=3, decoder_hidden_size=hidden, share_decoder_input_output_embed=shared)
    output = model(text())
    torch.testing.assert_close(model.get_normalized_probs(output, log_probs=True), output[0])
    total = model.get_normalized_probs(output, log_probs=False).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_shared_embeddings_are_one_parameter():
    free, shared = build(), build(share_decoder_input_output_embed=True)
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (free, shared)]
    assert count[0] - count[1] == len(dictionary()) * SIZES["decoder_embed_dim"]


def test_embedding_dropout_drops_words_everywhere():
    model = build(dropout=0.0, embed_dropout=0.5).train()
    seen = []
    model.decoder.dropout_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.arange(4, 44).repeat(2, 2)
    model(tokens)
    (x,) = seen
    dropped = x.eq(0).all(2)
    assert 5 < dropped[:40, 0].sum() < 35
    assert torch.equal(dropped[:40], dropped[40:])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    kept = dropped[:, 0].logical_not()
    embedded = model.decoder.embed_scale * model.decoder.embed_tokens(tokens[0])
    torch.testing.assert_close(x[kept, 0], 2 * embedded[kept])


@pytest.mark.parametrize("place", ["dropout_in", "dropout_out"])
def test_dropout_is_locked(place):
    model = build(dropout=0.0, **{f"decoder_{place}": 0.5}).train()
    seen = []
    getattr(model.decoder, place).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(text())
    zero = seen[0].eq(0)
    assert torch.equal(zero.any(0), zero.all(0))
    assert 0 < zero[0].sum() < zero[0].numel()


def test_adaptive_softmax_gives_probabilities():
    model = build(adaptive_softmax_cutoff=[10, 30], adaptive_softmax_factor=2)
    tokens = text()
    scores = model.get_normalized_probs(model(tokens), log_probs=True)
    total = scores.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_fewer_words_to_predict_than_to_read():
    words = dictionary()
    scores = build(target=TruncatedDictionary(words, 20))(text())[0]
    assert scores.size(-1) == 20


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(decoder_hidden_size=0), "--decoder-hidden-size is 0, but must be positive"),
        (dict(mixture_of_softmaxes=-1), "--mixture-of-softmaxes is -1, but must be 0 or positive"),
        (
            dict(mixture_of_softmaxes=2, adaptive_softmax_cutoff=[10]),
            "--mixture-of-softmaxes cannot be used with --adaptive-softmax-cutoff",
        ),
        (
            dict(share_decoder_input_output_embed=True, adaptive_softmax_cutoff=[10]),
            "--share-decoder-input-output-embed cannot be used with --adaptive-softmax-cutoff",
        ),
        (dict(cell="gru", cell_activation="identity"), "--cell-activation identity is for lrn and olrn"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_shared_embeddings_need_one_dictionary():
    with pytest.raises(ValueError, match="needs one dictionary, but 54 words are read and 20 predicted"):
        build(target=TruncatedDictionary(dictionary(), 20), share_decoder_input_output_embed=True)
