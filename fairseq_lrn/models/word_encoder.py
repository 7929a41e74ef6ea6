"""Words, their characters and recurrent layers: the encoder of the models that do not write text."""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from fairseq.data import Dictionary
from fairseq.modules import CharacterTokenEmbedder
from torch import Tensor

from ..modules import LockedDropout, StackedRecurrent
from .base import CellConfig, build_embedding, check_cell, check_positive, find_padding, read_vectors


@dataclass
class WordEncoderConfig(CellConfig):
    """Options of :class:`WordEncoder`."""

    encoder_embed_path: Optional[str] = field(
        default=None, metadata={"help": "text file of word vectors, as GloVe or word2vec write it"}
    )
    encoder_embed_dim: int = field(default=100, metadata={"help": "encoder embedding dimension"})
    encoder_hidden_size: int = field(default=100, metadata={"help": "encoder hidden size, of each direction"})
    encoder_layers: int = field(default=1, metadata={"help": "number of encoder layers"})
    char_embed_dim: int = field(
        default=0, metadata={"help": "width of the embeddings of a word's bytes; 0: read words only"}
    )


class WordEncoder(nn.Module):
    """Embeddings of words, a convolution over their bytes, and a bidirectional recurrence.

    Args:
        cfg: a :class:`WordEncoderConfig`
        dictionary: of the words
        max_word_length: bytes given of each word, where ``cfg.char_embed_dim`` is not 0

    Raises:
        ValueError: sizes that are not positive, words of less than 3 bytes, an activation that the unit does
            not take, vectors of another width
    """

    def __init__(self, cfg: WordEncoderConfig, dictionary: Dictionary, max_word_length: int = 0) -> None:
        super().__init__()
        check_positive(cfg, ("encoder_embed_dim", "encoder_hidden_size", "encoder_layers"))
        check_cell(cfg)
        self.padding_idx = dictionary.pad()
        self.embed_tokens = build_embedding(dictionary, cfg.encoder_embed_dim)
        read_vectors(
            self.embed_tokens,
            cfg,
            "encoder_embed_path",
            lambda path: load_vectors(path, dictionary, self.embed_tokens),
        )
        size = cfg.encoder_embed_dim
        self.embed_chars = None
        if cfg.char_embed_dim > 0:
            if max_word_length < 3:
                raise ValueError(f"--max-word-length is {max_word_length}, but must be at least 3")
            width = 2 * cfg.char_embed_dim
            self.embed_chars = CharacterTokenEmbedder(
                None, [(3, width)], cfg.char_embed_dim, width, 0, max_word_length, char_inputs=True
            )
            # never read, and DistributedDataParallel wants a gradient of every parameter
            self.embed_chars.symbol_embeddings.requires_grad_(False)
            size += width
        self.dropout = LockedDropout(cfg.dropout)
        self.rnn = StackedRecurrent(
            str(cfg.cell),
            size,
            cfg.encoder_hidden_size,
            cfg.encoder_layers,
            bidirectional=True,
            dropout=cfg.dropout,
            activation=str(cfg.cell_activation),
        )
        self.output_size = self.rnn.output_size

    def forward(
        self, src_tokens: Tensor, src_chars: Optional[Tensor] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Encode a batch of sentences, padded on either side.

        Args:
            src_tokens: (B, T) word ids
            src_chars: (B, T, max_word_length) bytes of each word, from
                :func:`~fairseq_lrn.tasks.words.encode_chars`, if the model reads them

        Returns:
            output (T, B, ``output_size``) and padding mask (B, T), True at padding, None without any
        """
        padding_mask = find_padding(src_tokens, self.padding_idx)
        x = self.embed_tokens(src_tokens)
        if self.embed_chars is not None:
            x = torch.cat([x, self.embed_chars(src_chars)], 2)
        x, _ = self.rnn(self.dropout(x.transpose(0, 1)), None, padding_mask)
        return self.dropout(x), padding_mask


def load_vectors(path: str, dictionary: Dictionary, embedding: nn.Embedding) -> None:
    """Copy the vectors of the text file ``path`` for the dictionary's words into ``embedding`` (V, C).

    A line is a word and C numbers. word2vec's first line, two counts, is skipped. A word that is not in the
    file gets the vector of its lower-case form.

    Raises:
        ValueError: a vector is narrower than C, or there is none of width C for any of the words
    """
    wanted: Dict[str, List[int]] = {}
    for index in range(dictionary.nspecial, len(dictionary)):
        word = dictionary[index]
        wanted.setdefault(word, []).append(index)
        if word != word.lower():
            wanted.setdefault(word.lower(), []).append(index)
    exact = set()
    found = False
    width = embedding.embedding_dim
    with open(path, encoding="utf-8", errors="replace") as file, torch.no_grad():
        for number, line in enumerate(file, 1):
            # from the right: a few of GloVe's words have a space within
            word, *values = line.rstrip().rsplit(" ", width)
            if number == 1 and len(values) == 1:
                continue
            for index in wanted.get(word, ()):
                if len(values) != width:
                    raise ValueError(
                        f"{path}, line {number}, has a vector of {len(values)} numbers, but the embedding is "
                        f"{width} wide"
                    )
                if index not in exact:
                    embedding.weight[index] = torch.tensor([float(value) for value in values])
                    found = True
                if dictionary[index] == word:
                    exact.add(index)
    if not found:
        raise ValueError(f"{path} has no vector of {width} numbers for any word of the dictionary")
