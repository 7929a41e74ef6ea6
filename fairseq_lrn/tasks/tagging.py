"""One tag a word: fairseq task ``tagging``."""

import os
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from fairseq.modules.character_token_embedder import CHAR_PAD_IDX
from fairseq.tasks import register_task
from fairseq.tokenizer import tokenize_line
from omegaconf import MISSING
from torch import Tensor

from .words import WordTask, collate, encode_chars, encode_words, read_lines


@dataclass
class TaggingConfig(FairseqDataclass):
    """Options of the task ``tagging``."""

    data: str = field(
        default=MISSING,
        metadata={"help": "folder that fairseq-preprocess -s words -t tags --dataset-impl raw wrote"},
    )
    max_word_length: int = field(
        default=20, metadata={"help": "bytes read of each word; a trained model keeps its number"}
    )


class TaggingDataset(LanguagePairDataset):
    """Sentences with the bytes of each word, and their tags, without </s> and padded on the right.

    Args:
        sentences: lists of words
        tags: their tags, ids (T_i,)
        dictionary: of the words
        tag_dictionary: of the tags
        max_word_length: bytes read of each word
    """

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Tensor],
        dictionary: Dictionary,
        tag_dictionary: Dictionary,
        max_word_length: int,
    ) -> None:
        sizes = np.array([len(words) for words in sentences])
        super().__init__(
            [encode_words(words, dictionary) for words in sentences],
            sizes,
            dictionary,
            tags,
            sizes,
            tag_dictionary,
            left_pad_source=False,
            input_feeding=False,
        )
        self.chars = [encode_chars(words, max_word_length) for words in sentences]

    def collater(self, samples: List[Dict[str, Any]], pad_to_length: Optional[Dict] = None) -> Dict[str, Any]:
        """As in :class:`LanguagePairDataset`, with ``src_chars`` (B, T, max_word_length)."""
        batch = super().collater(samples, pad_to_length)
        if samples:
            rows = [self.chars[i] for i in batch["id"].tolist()]
            batch["net_input"]["src_chars"] = collate(rows, CHAR_PAD_IDX)
        return batch


class ViterbiGenerator:
    """The most probable tags of each sentence, in the form of fairseq's other generators.

    Args:
        dictionary: of the words
    """

    symbols_to_strip_from_output: FrozenSet[int] = frozenset()

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.eos = dictionary.eos()

    def generate(self, models: Sequence[Any], sample: Dict[str, Any], **_: Any) -> List[List[Dict[str, Any]]]:
        """Return one hypothesis a sentence: ``tokens`` (T_i,), ids of tags, and ``score``, log-probability.

        Raises:
            ValueError: several models, or a sentence whose scores are not numbers
        """
        if len(models) != 1:
            raise ValueError(f"--path names {len(models)} checkpoints, but tagging takes one")
        net_input = sample["net_input"]
        decoded = models[0].decode(models[0](**net_input))
        for words, (tags, score) in zip(net_input["src_tokens"], decoded):
            if not torch.isfinite(score):
                sentence = self.dictionary.string(words[: len(tags)])
                raise ValueError(
                    f"the sentence {sentence!r} has no tags, as its score is {score.item()}: the model "
                    "diverged"
                )
        return [
            [
                {
                    "tokens": tags[words[: len(tags)].ne(self.eos)],
                    "score": score.item(),
                    "alignment": None,
                    "positional_scores": score.new_empty(0),  # the random field scores all tags together
                }
            ]
            for words, (tags, score) in zip(net_input["src_tokens"], decoded)
        ]


@register_task("tagging", dataclass=TaggingConfig)
class TaggingTask(WordTask):
    """Give each word of a sentence a tag. Validation reports the F1 of the entities that the tags spell.

    Entities are seqeval's ``get_entities`` of tags in IOBES (or IOB2), counted over the whole data.

    Args:
        cfg: a :class:`TaggingConfig`
        dictionary: of the words
        tag_dictionary: of the tags
    """

    def __init__(self, cfg: TaggingConfig, dictionary: Dictionary, tag_dictionary: Dictionary) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary
        self.tag_dictionary = tag_dictionary

    @classmethod
    def setup_task(cls, cfg: TaggingConfig, **kwargs: Any) -> "TaggingTask":
        """Load the dictionaries dict.words.txt and dict.tags.txt."""
        return cls(
            cfg, *(Dictionary.load(os.path.join(cfg.data, f"dict.{x}.txt")) for x in ("words", "tags"))
        )

    @property
    def source_dictionary(self) -> Dictionary:
        """Of the words."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """Of the tags."""
        return self.tag_dictionary

    def load_dataset(self, split: str, **kwargs: Any) -> None:
        """Load ``split``.words-tags.words and ``split``.words-tags.tags, as :class:`TaggingDataset`.

        Raises:
            ValueError: as :func:`read_sentences`
        """
        prefix = os.path.join(self.cfg.data, f"{split}.words-tags")
        sentences, tags = read_sentences(f"{prefix}.words", f"{prefix}.tags", self.tag_dictionary)
        self.datasets[split] = TaggingDataset(
            sentences, tags, self.dictionary, self.tag_dictionary, self.cfg.max_word_length
        )

    def build_generator(self, models: Sequence[Any], args: Any, **kwargs: Any) -> ViterbiGenerator:
        """Return the generator that finds the most probable tags."""
        return ViterbiGenerator(self.dictionary)

    def get_interactive_tokens_and_lengths(
        self, lines: List[str], encode_fn: Any
    ) -> Tuple[List[Tensor], List[int]]:
        """Split lines into words. A line without words is </s>, whose tag is dropped.

        fairseq-interactive passes only ids on. So each new word gets an id after those that the model knows.
        From the id :meth:`inference_step` finds the word's bytes.
        """
        unk, eos = self.dictionary.unk(), self.dictionary.eos()
        tokens = [
            torch.tensor(
                [max(self.dictionary.add_symbol(word), unk) for word in tokenize_line(line)] or [eos]
            )
            for line in map(encode_fn, lines)
        ]
        return tokens, [len(ids) for ids in tokens]

    def build_dataset_for_inference(
        self, src_tokens: List[Tensor], src_lengths: List[int], **kwargs: Any
    ) -> LanguagePairDataset:
        """Return a dataset of the results of :meth:`get_interactive_tokens_and_lengths`."""
        return LanguagePairDataset(src_tokens, src_lengths, self.dictionary, left_pad_source=False)

    def inference_step(
        self, generator: ViterbiGenerator, models: Sequence[Any], sample: Dict[str, Any], **kwargs: Any
    ) -> List[List[Dict[str, Any]]]:
        """Tag a batch of a :class:`TaggingDataset`, or of :meth:`build_dataset_for_inference`."""
        net_input = sample["net_input"]
        if "src_chars" not in net_input:
            ids = net_input["src_tokens"]
            chars = [
                encode_chars([self.dictionary[i] for i in row], self.cfg.max_word_length)
                for row in ids.tolist()
            ]
            known = ids < models[0].encoder.embed_tokens.num_embeddings
            net_input["src_tokens"] = ids.where(known, ids.new_tensor(self.dictionary.unk()))
            net_input["src_chars"] = torch.stack(chars).to(ids)
        return super().inference_step(generator, models, sample, **kwargs)

    def valid_step(
        self, sample: Dict[str, Any], model: Any, criterion: Any
    ) -> Tuple[Any, Any, Dict[str, Any]]:
        """As in :class:`FairseqTask`, counting entities too.

        Raises:
            ImportError: the package seqeval is not installed
        """
        try:
            from seqeval.metrics.sequence_labeling import get_entities
        except ImportError as error:
            raise ImportError("the entities' F1 needs the package seqeval: pip install seqeval") from error
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        hypos = self.inference_step(self.build_generator([model], None), [model], sample)
        correct = predicted = actual = 0
        for (hypo,), target in zip(hypos, sample["target"]):
            found, there = (
                set(get_entities([self.tag_dictionary[i] for i in ids.tolist()]))
                for ids in (hypo["tokens"], target[: len(hypo["tokens"])])
            )
            correct += len(found & there)
            predicted += len(found)
            actual += len(there)
        logging_output.update(_correct_entities=correct, _entities=predicted + actual)
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        """As in :class:`FairseqTask`, with F1 in percent if entities were counted."""
        super().reduce_metrics(logging_outputs, criterion)
        if any("_entities" in log for log in logging_outputs):
            for key in ("_correct_entities", "_entities"):
                metrics.log_scalar(key, sum(log.get(key, 0) for log in logging_outputs))
            metrics.log_derived("f1", f1)


def f1(meters: Dict[str, Any]) -> float:
    """Return 200 · correct / (predicted + actual), to two places, or 0 without entities."""
    total = meters["_entities"].sum
    return safe_round(200 * meters["_correct_entities"].sum / total, 2) if total else 0.0


def read_sentences(
    words_path: str, tags_path: str, tag_dictionary: Dictionary
) -> Tuple[List[List[str]], List[Tensor]]:
    """Read a file of words and one of tags, separated by blanks. A line is a sentence.

    Raises:
        ValueError: a line has no words, or different numbers of words and tags, or a tag that is not in the
            dictionary, or is not UTF-8
    """
    sentences, tag_ids = [], []
    lines = zip_longest(read_lines(words_path), read_lines(tags_path), fillvalue="")
    for number, pair in enumerate(lines, 1):
        words, tags = map(tokenize_line, pair)
        if len(words) != len(tags):
            raise ValueError(
                f"{words_path}, line {number}, has {len(words)} words, but {tags_path} has {len(tags)} tags"
            )
        if not words:
            raise ValueError(f"{words_path}, line {number}, has no words")
        ids = [tag_dictionary.index(tag) for tag in tags]
        if min(ids) < tag_dictionary.nspecial:
            tag = tags[ids.index(min(ids))]
            raise ValueError(f"{tags_path}, line {number}, has the tag {tag}, which is not in dict.tags.txt")
        sentences.append(words)
        tag_ids.append(torch.tensor(ids))
    return sentences, tag_ids
