"""Reading comprehension: fairseq task ``reading_comprehension`` and SQuAD's exact match and F1."""

import json
import os
import re
import string
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, Set, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.modules.character_token_embedder import CHAR_PAD_IDX
from fairseq.tasks import register_task
from omegaconf import MISSING
from torch import Tensor

from .words import WordTask, collate, encode_chars, encode_words, read_lines


@dataclass
class ReadingComprehensionConfig(FairseqDataclass):
    """Options of the ``reading_comprehension`` task."""

    data: str = field(
        default=MISSING, metadata={"help": "folder made by examples/reading_comprehension/squad.py"}
    )
    max_word_length: int = field(
        default=16, metadata={"help": "bytes read of each word; a trained model keeps its number"}
    )
    max_answer_length: int = field(default=30, metadata={"help": "most tokens of a predicted answer"})


@register_task("reading_comprehension", dataclass=ReadingComprehensionConfig)
class ReadingComprehensionTask(WordTask):
    """Find the answer to a question as a span of a passage (SQuAD 1.1; Rajpurkar et al., EMNLP 2016).

    The model scores each token as the first and as the last one of the answer, (B, 2, T). With ``--criterion
    cross_entropy`` the loss is the mean of the two cross entropies, in bits. Validation reports
    ``em`` and ``f1``, the percentages of SQuAD's evaluation script.

    Raises:
        ValueError: ``cfg.max_answer_length`` is not positive
    """

    def __init__(self, cfg: ReadingComprehensionConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        if cfg.max_answer_length < 1:
            raise ValueError(f"--max-answer-length is {cfg.max_answer_length}, but must be at least 1")
        self.dictionary = dictionary

    @classmethod
    def setup_task(cls, cfg: ReadingComprehensionConfig, **kwargs: Any) -> "ReadingComprehensionTask":
        """Make the task, with the dictionary ``dict.txt`` of ``cfg.data``."""
        return cls(cfg, cls.load_dictionary(os.path.join(cfg.data, "dict.txt")))

    @property
    def source_dictionary(self) -> Dictionary:
        """The dictionary of questions and passages."""
        return self.dictionary

    @property
    def target_dictionary(self) -> None:
        """None: the model predicts positions."""
        return None

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """Load ``split`` from ``SPLIT.passages`` and ``SPLIT.questions``, one JSON object a line.

        Raises:
            ValueError: as :func:`read_examples`
        """
        rows = read_examples(os.path.join(self.cfg.data, split))
        self.datasets[split] = ReadingComprehensionDataset(*rows, self.dictionary, self.cfg.max_word_length)

    def predict(self, sample: Dict[str, Any], model: Any) -> Dict[str, str]:
        """Return {id: answer} of a batch's questions. Each answer is copied from the passage.

        Raises:
            ValueError: a question's scores are not numbers
        """
        with torch.no_grad():
            lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        for example, wrong in zip(sample["examples"], lprobs.isnan().flatten(1).any(1).tolist()):
            if wrong:
                raise ValueError(
                    f"question {example['id']} has no answer, as its scores are NaN: the model diverged"
                )
        spans = best_spans(lprobs, self.cfg.max_answer_length).tolist()
        answers = {}
        for example, (first, last) in zip(sample["examples"], spans):
            text, tokens = example["passage"]["text"], example["passage"]["tokens"]
            answers[example["id"]] = text[tokens[first][0] : tokens[last][1]]
        return answers

    def valid_step(
        self, sample: Dict[str, Any], model: Any, criterion: Any
    ) -> Tuple[Any, Any, Dict[str, Any]]:
        """As fairseq's, with the sums of exact match and F1 over the batch in the logging output."""
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        predictions = self.predict(sample, model)
        for name, score in (("em", exact_match), ("f1", f1)):
            logging_output[name] = sum(
                max(score(predictions[example["id"]], answer) for answer in example["answers"])
                for example in sample["examples"]
            )
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        """As fairseq's, with ``em`` and ``f1`` if they were summed."""
        super().reduce_metrics(logging_outputs, criterion)
        if any("em" in log for log in logging_outputs):
            questions = sum(log["nsentences"] for log in logging_outputs)
            for name in ("em", "f1"):
                total = sum(log[name] for log in logging_outputs)
                metrics.log_scalar(name, 100 * total / questions, questions, round=2)


class ReadingComprehensionDataset(FairseqDataset):
    """Questions, each with its passage and the span of its answer.

    Args:
        passages: dictionaries of ``text`` and ``tokens``, where each token begins and ends in the text
        questions: dictionaries of ``id``, ``tokens`` as text, number of the ``passage``, ``span`` of the
            answer (first and last token), and ``answers``, the texts of all right answers
        dictionary: of the words
        max_word_length: bytes read of each word
    """

    def __init__(
        self,
        passages: List[Dict[str, Any]],
        questions: List[Dict[str, Any]],
        dictionary: Dictionary,
        max_word_length: int,
    ) -> None:
        super().__init__()
        self.passages = passages
        self.questions = questions
        self.dictionary = dictionary
        self.max_word_length = max_word_length
        self.sizes = np.array([len(passages[question["passage"]]["tokens"]) for question in questions])

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """Return a question, with its passage instead of the passage's number."""
        question = self.questions[index]
        return {**question, "index": index, "passage": self.passages[question["passage"]]}

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """Make a batch: ids of words (B, T), their bytes (B, T, max_word_length), spans (B, 2)."""
        if len(samples) == 0:
            return {}
        net_input = {}
        for name, sentences in (
            ("question", [sample["tokens"] for sample in samples]),
            ("passage", [_words(sample["passage"]) for sample in samples]),
        ):
            ids = [encode_words(words, self.dictionary) for words in sentences]
            chars = [encode_chars(words, self.max_word_length) for words in sentences]
            net_input[f"{name}_tokens"] = collate(ids, self.dictionary.pad())
            net_input[f"{name}_chars"] = collate(chars, CHAR_PAD_IDX)
        target = torch.tensor([sample["span"] for sample in samples])
        return {
            "id": torch.tensor([sample["index"] for sample in samples]),
            "net_input": net_input,
            "target": target,
            "ntokens": target.numel(),
            "examples": samples,
        }

    def num_tokens(self, index: int) -> int:
        """Return the length of a question's passage."""
        return self.sizes[index]

    def size(self, index: int) -> int:
        """Return the length of a question's passage."""
        return self.sizes[index]

    def ordered_indices(self) -> np.ndarray:
        """Return the questions in order of the passage's length; those of equal length are shuffled."""
        indices = np.random.permutation(len(self))
        return indices[np.argsort(self.sizes[indices], kind="stable")]


def read_examples(prefix: str) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Read ``PREFIX.passages`` and ``PREFIX.questions`` for :class:`ReadingComprehensionDataset`.

    Raises:
        ValueError: a line is not UTF-8, or not a JSON object of the right keys; it has no words or no
            answers; its passage does not exist, its span is outside the passage, or its id is another
            question's
    """
    passages: List[Dict[str, Any]] = []
    questions: List[Dict[str, Any]] = []
    ids: Set[Any] = set()
    for kind, rows, keys in (
        ("passages", passages, {"text", "tokens"}),
        ("questions", questions, {"id", "tokens", "passage", "span", "answers"}),
    ):
        path = f"{prefix}.{kind}"
        for number, line in enumerate(read_lines(path), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            missing = sorted(keys.difference(row if isinstance(row, dict) else ()))
            problem = f"has no {', '.join(missing)}" if missing else _find_problem(row, passages, ids)
            if problem:
                raise ValueError(f"{path}, line {number}, {problem}")
            rows.append(row)
    return passages, questions


def _find_problem(row: Dict[str, Any], passages: List[Dict[str, Any]], ids: Set[str]) -> str:
    """Return the fault of a passage or a question, or an empty string."""
    if not row["tokens"]:
        return "has no words"
    if "text" in row:
        return ""
    if not row["answers"]:
        return "has no answers"
    if not 0 <= row["passage"] < len(passages):
        return f"has the passage {row['passage']}, but there are {len(passages)}"
    words, (first, last) = len(passages[row["passage"]]["tokens"]), row["span"]
    if not 0 <= first <= last < words:
        return f"has the span {first} to {last}, but the words of its passage are 0 to {words - 1}"
    if row["id"] in ids:
        return f"has the id {row['id']}, which another question has"
    ids.add(row["id"])
    return ""


def _words(passage: Dict[str, Any]) -> List[str]:
    return [passage["text"][begin:end] for begin, end in passage["tokens"]]


def best_spans(lprobs: Tensor, max_answer_length: int) -> Tensor:
    """Return the most probable spans of at most ``max_answer_length`` tokens, first and last token, (B, 2).

    ``lprobs`` (B, 2, T) are the log-probabilities of each token as the first and as the last one.
    """
    start, end = lprobs.unbind(1)
    ends = F.pad(end, (0, max_answer_length - 1), value=float("-inf")).unfold(1, max_answer_length, 1)
    best = (start.unsqueeze(2) + ends).flatten(1).argmax(1)
    first = best.div(max_answer_length, rounding_mode="floor")
    return torch.stack([first, first + best % max_answer_length], 1)


def normalize(answer: str) -> str:
    """Return the answer in lower case, without punctuation, articles and superfluous white space."""
    answer = "".join(char for char in answer.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if the normalized answers are the same, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words of the normalized answers."""
    predicted, right = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
