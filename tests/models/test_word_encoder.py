"""Words and their bytes, encoded; vectors from a text file."""

import pytest
import torch
from batches import DEVICES, dictionary, sentences
from fairseq.data import Dictionary
from fairseq.models.transformer import Embedding

from fairseq_lrn.models.word_encoder import WordEncoder, WordEncoderConfig, load_vectors
from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.words import encode_chars

SMALL = dict(encoder_embed_dim=6, encoder_hidden_size=5, encoder_layers=2)
LENGTHS = [7, 3, 11, 1]


def encoder(device="cpu", **options):
    torch.manual_seed(0)
    return WordEncoder(WordEncoderConfig(**{**SMALL, **options}), dictionary(), 8).eval().to(device)


def characters(tokens):
    """Bytes of made words; two words of the same first letter are written alike."""
    words = dictionary()
    return torch.stack([encode_chars([words[i][:2] for i in row], 8) for row in tokens.tolist()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("char_embed_dim", [0, 4], ids=["words", "characters"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_mates_do_not_matter(cell, char_embed_dim, left, device):
    model = encoder(device, cell=cell, char_embed_dim=char_embed_dim)
    tokens = sentences(LENGTHS, model.padding_idx, left).to(device)
    chars = characters(tokens).to(device)
    output, padding_mask = model(tokens, chars)
    assert output.shape == (11, 4, model.output_size) == (11, 4, 10)
    assert torch.equal(padding_mask, tokens.eq(model.padding_idx))
    for i, n in enumerate(LENGTHS):
        at = slice(11 - n, None) if left else slice(n)
        alone, none = model(tokens[i : i + 1, at], chars[i : i + 1, at])
        assert none is None
        torch.testing.assert_close(output[at, i], alone[:, 0], rtol=1e-4, atol=1e-6)


def test_bytes_tell_words_of_one_id_apart():
    model = encoder(char_embed_dim=4)
    tokens = torch.full((1, 3), dictionary().unk())
    one, other = (encode_chars(words, 8)[None] for words in (["a", "b", "c"], ["a", "x", "c"]))
    assert not torch.allclose(model(tokens, one)[0], model(tokens, other)[0])


def test_words_in_too_few_bytes():
    with pytest.raises(ValueError, match="--max-word-length is 2, but must be at least 3"):
        WordEncoder(WordEncoderConfig(**SMALL, char_embed_dim=4), dictionary(), 2)


def test_both_directions_reach_every_word():
    model = encoder()
    tokens = sentences([5], model.padding_idx)
    changed = tokens.clone()
    changed[0, 2] = 4 + (tokens[0, 2] - 3) % 50
    difference = (model(tokens)[0] - model(changed)[0]).abs().amax(2).squeeze(1)
    assert (difference > 1e-6).all()


def test_dropout_zeroes_a_channel_throughout_a_sentence():
    model = encoder(dropout=0.5).train()
    output, _ = model(sentences([9, 9], model.padding_idx))
    dropped = output.eq(0)
    assert dropped.any() and not dropped.all()
    assert torch.equal(dropped.all(0), dropped.any(0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(encoder_layers=0), "--encoder-layers is 0, but must be positive"),
        (dict(encoder_hidden_size=-1), "--encoder-hidden-size is -1, but must be positive"),
        (dict(cell="gru", cell_activation="identity"), "is for lrn and olrn, but --cell is gru"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


@pytest.fixture
def words():
    made = Dictionary()
    for word in ("the", "Paris", "May", "absent", "."):
        made.add_symbol(word)
    return made


def load(words, path, text):
    (path / "vectors").write_text(text, encoding="utf-8")
    embedding = Embedding(len(words), 2, words.pad())
    before = embedding.weight.detach().clone()
    load_vectors(path / "vectors", words, embedding)
    return before, embedding.weight.detach()


@pytest.mark.parametrize("header", ["", "6 2\n"], ids=["glove", "word2vec"])
def test_vectors(words, tmp_path, header):
    """A word's own vector goes before its lower-case form's, wherever they stand; others keep theirs."""
    lines = "may 1 1\nthe 2 -2.5\n. . 9 9\n. 3 3\nMay 4 4\nparis 5 5\nmay 6 6\n<unk> 7 7\n"
    before, after = load(words, tmp_path, header + lines)
    expected = {"the": [2, -2.5], "Paris": [5, 5], "May": [4, 4], ".": [3, 3]}
    for word, vector in expected.items():
        assert after[words.index(word)].tolist() == vector
    others = [i for i in range(len(words)) if words[i] not in expected]
    assert torch.equal(after[others], before[others])
    assert after[words.pad()].tolist() == [0, 0]


def test_vectors_reach_the_encoder(words, tmp_path):
    (tmp_path / "vectors").write_text("the " + "0.5 " * 6 + "\n")
    config = WordEncoderConfig(**SMALL, encoder_embed_path=str(tmp_path / "vectors"))
    assert WordEncoder(config, words).embed_tokens.weight[words.index("the")].tolist() == [0.5] * 6


@pytest.mark.parametrize(
    "text, message",
    [
        ("of 1 2\nthe 1\n", "line 2, has a vector of 1 numbers, but the embedding is 2 wide"),
        ("the 1 2 3\n. 1 2 3\n", "has no vector of 2 numbers for any word of the dictionary"),
    ],
    ids=["narrow", "wide"],
)
def test_vectors_of_another_width(words, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(words, tmp_path, text)
