"""Small dictionaries and batches for the models' tests."""

import types

import pytest
import torch
from fairseq.data import Dictionary

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def dictionary(words=50, first="w"):
    made = Dictionary()
    for i in range(words):
        made.add_symbol(f"{first}{i}")
    return made


def task(source=None, target=None):
    source = source or dictionary()
    return types.SimpleNamespace(source_dictionary=source, target_dictionary=target or source)


def sentences(lengths, pad, left=False, seed=1):
    """Random token ids (B, max(lengths)), each sentence ending with </s> (2), padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.full((len(lengths), max(lengths)), pad)
    for row, n in zip(batch, lengths):
        words = torch.cat([torch.randint(4, 54, (n - 1,), generator=generator), torch.tensor([2])])
        row[len(row) - n :] = words if left else row[len(row) - n :]
        if not left:
            row[:n] = words
    return batch
