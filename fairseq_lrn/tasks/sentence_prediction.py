"""Checks the labels of fairseq's task ``sentence_prediction``; importing it changes the task.

fairseq finds a wrong label in the middle of training, and its message names neither the label nor the line.
"""

import logging
import math
import os
from typing import Any

from fairseq.data import FairseqDataset, data_utils
from fairseq.tasks.sentence_prediction import SentencePredictionTask

logger = logging.getLogger(__name__)
_load_dataset = SentencePredictionTask.load_dataset


def load_dataset(
    self: SentencePredictionTask, split: str, combine: bool = False, **kwargs: Any
) -> FairseqDataset:
    """As fairseq's, of a split whose labels are right; it may have none.

    Raises:
        ValueError: a token to add is not in the dictionary; there are not as many labels as inputs; a line's
            label is missing, unknown, not alone, beyond ``--num-classes`` or, for regression, not finite
    """
    cfg, words = self.cfg, self.source_dictionary
    for name in ("init_token", "separator_token"):
        token = getattr(cfg, name)
        if token is not None and not 0 <= token < len(words):
            raise ValueError(
                f"--{name.replace('_', '-')} is {token}, but must be an index in the dictionary, below "
                f"{len(words)}"
            )
    lines = {}
    for name in ("input0", "input1"):
        path = os.path.join(cfg.data, name, split)
        dataset = data_utils.load_indexed_dataset(path, words, combine=combine)
        if dataset is not None:
            lines[path] = len(dataset)
    path = os.path.join(cfg.data, "label", split)
    if cfg.regression_target:
        path += ".label"
        if os.path.exists(path):
            lines[path] = _check_numbers(path, cfg.num_classes)
    else:
        labels = data_utils.load_indexed_dataset(path, self.label_dictionary, combine=combine)
        if labels is not None:
            lines[path] = len(labels)
            _check_classes(labels, path, self)
    if len(set(lines.values())) > 1:
        counts = ", ".join(f"{path} has {count}" for path, count in lines.items())
        raise ValueError(f"there must be one label for each input, but of lines {counts}")
    return _load_dataset(self, split, combine, **kwargs)


def _check_classes(labels: Any, path: str, task: SentencePredictionTask) -> None:
    words, classes = task.label_dictionary, task.cfg.num_classes
    # <mask> is fairseq's, and fairseq-preprocess rounds the number of words up
    known = [
        word for word in words.symbols[words.nspecial :] if not word.startswith(("<mask>", "madeupword"))
    ]
    if len(known) < classes:
        logger.warning("--num-classes is %d, but there are only the labels %s", classes, ", ".join(known))
    if labels.supports_prefetch:
        labels.prefetch(range(len(labels)))
    for number in range(1, len(labels) + 1):
        ids = [i for i in labels[number - 1].tolist() if i != words.eos()]
        if len(ids) != 1:
            raise ValueError(f"{path}, line {number}, has {len(ids)} labels, but must have 1")
        label = ids[0] - words.nspecial
        if label < 0:
            raise ValueError(
                f"{path}, line {number}, has a label that the dictionary of labels has not: the training "
                f"set has {', '.join(known)}"
            )
        if label >= classes:
            raise ValueError(
                f"{path}, line {number}, has the label {words[ids[0]]}, number {label + 1} in the dictionary "
                f"of labels, but --num-classes is {classes}"
            )


def _check_numbers(path: str, targets: int) -> int:
    number = 0
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                right = [math.isfinite(float(word)) for word in line.split()]
            except ValueError:
                right = [False]
            if right != [True] * targets:
                raise ValueError(
                    f"{path}, line {number}, is {line.strip()!r}, but must be as many finite numbers as "
                    f"--num-classes says, {targets}"
                )
    return number


SentencePredictionTask.load_dataset = load_dataset
