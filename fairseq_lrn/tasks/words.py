"""Sentences of words as tensors: ids and bytes, alone and in batches."""

from typing import List, Sequence

import torch
from fairseq.data import Dictionary
from fairseq.modules.character_token_embedder import CHAR_PAD_IDX
from torch import Tensor


def encode_words(words: Sequence[str], dictionary: Dictionary) -> Tensor:
    """Return the ids (T,) of ``words``, that of ``<unk>`` for the unknown and for fairseq's own symbols."""
    # <s>, <pad> and </s> come before <unk>
    return torch.tensor([max(dictionary.index(word), dictionary.unk()) for word in words], dtype=torch.long)


def encode_chars(words: Sequence[str], max_word_length: int) -> Tensor:
    """Return the first bytes of each word's UTF-8, each plus one, zeros after them: (T, max_word_length)."""
    rows = [[byte + 1 for byte in word.encode()[:max_word_length]] for word in words]
    padded = [row + [CHAR_PAD_IDX] * (max_word_length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(words), max_word_length)


def collate(rows: List[Tensor], padding: int) -> Tensor:
    """Stack tensors (T_i, ...) to (B, max T_i, ...), filled with ``padding`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
