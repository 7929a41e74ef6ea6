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

    A text is cut into ``--tokens-per-sample`` tokens a block, and its blocks, in their order, into as many
    streams as all processes together have rows in a batch, ``--batch-size`` each. The streams' numbers of
    blocks differ by one at most; nothing of the text is left out. Batch n of an epoch holds block n of every
    stream that has one, and the model begins it with the states that block n - 1 ended with, block 0 with
    zeros. A training that goes on from a checkpoint in the middle of an epoch begins there with zeros, and so
    does an update of several blocks (``--update-freq``) that overflowed and that ``--amp`` tries again.

    ``fairseq-eval-lm`` reads the text as one stream, whatever ``--batch-size`` is, so that the result does
    not depend on ``--tokens-per-sample`` either.
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

    def get_batch_iterator(
        self, dataset: FairseqDataset, max_sentences: Optional[int] = None, **kwargs: Any
    ) -> EpochBatchIterator:
        """As fairseq's; batches of a text also have ``block`` in their ``net_input``.

        Raises:
            ValueError: ``max_sentences`` is None
        """
        if not isinstance(dataset, MonolingualDataset):  # sentences to score or to go on with
            return super().get_batch_iterator(dataset, max_sentences=max_sentences, **kwargs)
        if max_sentences is None:
            raise ValueError("--batch-size, the number of streams of text, is not given, but must be")
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

    def eval_lm_dataloader(self, dataset: FairseqDataset, context_window: int = 0, **kwargs: Any):
        """As fairseq's, but the text is one stream.

        Raises:
            ValueError: there is a context window, which would read words twice
        """
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
