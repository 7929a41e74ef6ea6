"""Words as tensors, against their definition."""

import pytest
import torch
from batches import dictionary

from fairseq_lrn.tasks.words import collate, encode_chars, encode_words, read_lines


def test_ids_of_words():
    words = dictionary(5)
    ids = encode_words(["w3", "w0", "unseen", "w4"], words)
    assert ids.dtype == torch.long
    assert [words[i] for i in ids.tolist()] == ["w3", "w0", "<unk>", "w4"]


def test_text_that_looks_like_a_special_symbol_is_an_unknown_word():
    words = dictionary(5)
    assert encode_words(["<s>", "<pad>", "</s>", "<unk>"], words).tolist() == [words.unk()] * 4


def test_bytes_of_words():
    chars = encode_chars(["ab", "für", "\0", "", "abcdefg"], 4)
    assert chars.dtype == torch.long
    assert chars.tolist() == [
        [98, 99, 0, 0],
        [103, 0xC3 + 1, 0xBC + 1, 115],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [98, 99, 100, 101],
    ]


def test_no_words():
    assert encode_words([], dictionary(5)).shape == (0,)
    assert encode_chars([], 4).shape == (0, 4)


def test_collating_pads_on_the_right():
    rows = [torch.tensor([[1, 2]]), torch.tensor([[3, 4], [5, 6], [7, 8]])]
    assert collate(rows, 9).tolist() == [[[1, 2], [9, 9], [9, 9]], [[3, 4], [5, 6], [7, 8]]]


def test_lines_of_a_file_end_at_line_feeds_alone(tmp_path):
    (tmp_path / "text").write_bytes("ä\r\n\nb\rc\u2028d".encode())
    assert list(read_lines(tmp_path / "text")) == ["ä", "", "b\rc\u2028d"]


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "text").write_bytes("a\nä\n".encode("latin-1"))
    with pytest.raises(ValueError, match="text, line 2, is not in UTF-8: invalid continuation byte"):
        list(read_lines(tmp_path / "text"))
