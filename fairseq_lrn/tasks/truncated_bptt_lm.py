"""Language modelling of whole texts: the state is carried from one block of a text to the next."""

from functools import partial
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.data import FairseqDataset, MonolingualDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask


@register_task("truncated_bptt_lm", dataclass=LanguageModelingConfig)
class TruncatedBPTTLMTask(LanguageModelingTask):
    """fairseq's ``language_modeling`` with truncated back-propagation through time.

    A text is cut into blocks of ``--tokens-per-sample`` tokens. The blocks, in their order, are cut into
    streams: ``--batch-size`` streams for each process. The streams' numbers of blocks differ by one at most,
    and all of the text is read. Batch n of an epoch holds block n of every stream that has one. The model
    starts it with the last states of block n - 1, and block 0 with zeros. It also starts with zeros after a
    checkpoint in the middle of an epoch, and in an update of several blocks (``--update-freq``) that
    overflowed and that ``--amp`` repeats.

    ``fairseq-eval-lm`` reads the text as one stream, whatever ``--batch-size`` is. So the result does not
    depend on ``--tokens-per-sample`` either.
    """

    def build_model(self, args, from_checkpoint=False):
        """As fairseq's.

        Raises:
            ValueError: the model has no state to carry
        """
        model = super().build_model(args, from_checkpoint)
        if not hasattr(model.decoder, "carried"):
            raise ValueError(
                f"--task truncated_bptt_lm needs --arch lrn_lm, but the model is {type(model).__name__}, "
                "which has no state to carry"
            )
        return model

    def load_dataset(self, split: str, **kwargs: Any) -> None:
        """As fairseq's.

        Raises:
            ValueError: an option drops or adds words of the text, or blocks have no words
        """
        cfg, special = self.args, self.dictionary.nspecial
        for wrong, message in (
            (cfg.add_bos_token, "--add-bos-token is given, but must not be: it puts <s> before each block"),
            (cfg.pad_to_fixed_bsz, "--pad-to-fixed-bsz is given, but must not be: streams end one by one"),
            (
                cfg.sample_break_mode == "complete_doc",
                "--sample-break-mode is complete_doc, which leaves out empty lines, but must be none, "
                "complete or eos",
            ),
            (
                cfg.shorten_method != "none",
                f"--shorten-method is {cfg.shorten_method}, which leaves out words, but must be none",
            ),
            (
                cfg.max_target_positions is not None,
                f"--max-target-positions is {cfg.max_target_positions}, but must not be given: "
                "--tokens-per-sample is the length of a block",
            ),
            (
                cfg.tokens_per_sample < 1,
                f"--tokens-per-sample is {cfg.tokens_per_sample}, but must be positive",
            ),
            (
                0 <= cfg.output_dictionary_size <= special,
                f"--output-dictionary-size is {cfg.output_dictionary_size}, but must be more than {special}, "
                "the number of symbols that a dictionary begins with",
            ),
        ):
            if wrong:
                raise ValueError(message)
        super().load_dataset(split, **kwargs)

    def get_batch_iterator(
        self,
        dataset: FairseqDataset,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        **kwargs: Any,
    ) -> EpochBatchIterator:
        """As fairseq's; batches of a text also have ``block`` in their ``net_input``.

        Raises:
            ValueError: ``max_sentences`` is None, or so many blocks have more than ``max_tokens`` words
        """
        if not isinstance(dataset, MonolingualDataset):  # sentences to score or to go on with
            return super().get_batch_iterator(dataset, max_tokens, max_sentences, **kwargs)
        if max_sentences is None:
            raise ValueError("--batch-size, the number of streams of text, is not given, but must be")
        longest = int(dataset.sizes.max(initial=0))
        if max_tokens is not None and max_sentences * longest > max_tokens:
            raise ValueError(
                f"--max-tokens is {max_tokens}, but must be at least {max_sentences * longest}, "
                f"--batch-size times the {longest} words of the longest block"
            )
        num_shards = kwargs.get("num_shards", 1)
        streams = np.array_split(np.arange(len(dataset)), max_sentences * num_shards)
        blocks = np.concatenate([np.arange(len(stream)) for stream in streams])
        return EpochBatchIterator(
            dataset=dataset,
            collate_fn=partial(_collate, dataset, blocks),
            # the earlier streams are the longer ones, so rows end from the last on
            batch_sampler=[
                [int(stream[block]) for stream in streams[shard::num_shards] if block < len(stream)]
                for block in range(len(streams[0]))
                for shard in range(num_shards)
            ],
            num_shards=num_shards,
            shard_id=kwargs.get("shard_id", 0),
            num_workers=kwargs.get("num_workers", 0),
            epoch=kwargs.get("epoch", 1),
            buffer_size=kwargs.get("data_buffer_size", 0),
            disable_shuffling=True,
            skip_remainder_batch=kwargs.get("skip_remainder_batch", False),
        )

    def eval_lm_dataloader(
        self,
        dataset: FairseqDataset,
        max_tokens: Optional[int] = None,
        num_shards: int = 1,
        context_window: int = 0,
        **kwargs: Any,
    ):
        """As fairseq's, but the text is one stream. Its blocks may have more than ``max_tokens`` words.

        Raises:
            ValueError: there are several shards, or a context window, which would read words twice
        """
        if num_shards > 1:
            raise ValueError(
                f"--num-shards or --distributed-world-size is {num_shards}, but must be 1: the text is one "
                "stream"
            )
        if context_window > 0:
            raise ValueError(f"--context-window is {context_window}, but must be 0: the state is carried")
        return self.get_batch_iterator(dataset, max_sentences=1, **kwargs).next_epoch_itr(shuffle=False)


def _collate(
    dataset: MonolingualDataset, blocks: np.ndarray, samples: List[Dict[str, Any]]
) -> Dict[str, Any]:
    batch = dataset.collater(samples)
    if samples:
        batch["net_input"]["block"] = int(blocks[samples[0]["id"]])
    return batch
