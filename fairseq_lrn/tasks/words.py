"""For the tasks that read words with their bytes: files, tensors, and a base class."""

import logging
from typing import Any, Dict, Iterator, List, Sequence

import torch
from fairseq.data import Dictionary
from fairseq.modules.character_token_embedder import CHAR_PAD_IDX
from fairseq.tasks import FairseqTask
from torch import Tensor

logger = logging.getLogger(__name__)


class WordTask(FairseqTask):
    """A task that reads ``cfg.max_word_length`` bytes of each word. A trained model keeps its number.

    Raises:
        ValueError: ``cfg.max_word_length`` is not positive
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        if cfg.max_word_length < 1:
            raise ValueError(f"--max-word-length is {cfg.max_word_length}, but must be positive")

    def state_dict(self) -> Dict[str, Any]:
        """Return the task's part of a checkpoint: ``max_word_length``."""
        return {**super().state_dict(), "max_word_length": self.cfg.max_word_length}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take ``max_word_length`` from a checkpoint, before its model is built."""
        state_dict = dict(state_dict)
        saved = state_dict.pop("max_word_length", self.cfg.max_word_length)
        if saved != self.cfg.max_word_length:
            logger.warning("--max-word-length is %d, as in training, not %d", saved, self.cfg.max_word_length)
            self.cfg.max_word_length = saved
        super().load_state_dict(state_dict)


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file in UTF-8, without their ends.

    Raises:
        ValueError: a line is not in UTF-8
    """
    with open(path, "rb") as file:  # as text, lines would end at a carriage return too
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not in UTF-8: {error.reason}") from error


def encode_words(words: Sequence[str], dictionary: Dictionary) -> Tensor:
    """Return the ids (T,) of ``words``. Unknown words and fairseq's symbols get the id of ``<unk>``."""
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
