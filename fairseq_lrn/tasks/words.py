"""Sentences of words as tensors: ids and bytes, alone and in batches."""

from typing import List, Sequence

import torch
from fairseq.data import Dictionary
from fairseq.modules.character_token_embedder import CHAR_PAD_IDX
from torch import Tensor


def encode_words(words: Sequence[str], dictionary: Dictionary) -> Tensor:
    """Return the ids (T,) of ``words``, that of ``<unk>`` for the unknown."""
    return torch.tensor([dictionary.index(word) for word in words], dtype=torch.long)


def encode_chars(words: Sequence[str], max_word_length: int) -> Tensor:
    """Return the first bytes of each word's UTF-8, each plus one, zeros after them: (T, max_word_length)."""
    chars = torch.full((len(words), max_word_length), CHAR_PAD_IDX, dtype=torch.long)
    for i, word in enumerate(words):
        encoded = word.encode()[:max_word_length]
        chars[i, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.long) + 1
    return chars


def collate(rows: List[Tensor], padding: int) -> Tensor:
    """Stack tensors (T_i, ...) to (B, max T_i, ...), filled with ``padding`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
