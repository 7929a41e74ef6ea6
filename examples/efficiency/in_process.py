"""Translate a binarized test set in this process: token ids in, token ids out, nothing else timed.

    python in_process.py ENGINE DATA CHECKPOINT SOURCE TARGET [--beam 5] [--batch-size 128]

ENGINE is `translator`, of this package, with an LRN, or `ctranslate2` with a Transformer. Sentences are
sorted by length; each batch is one call. It prints two things as fairseq-generate does: a line D for each
sentence, and the sentences a second, without loading.
"""

import argparse
import itertools
import time
from typing import Any, Callable, List

import numpy as np
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from fairseq.data import Dictionary, data_utils
from models import peer

from fairseq_lrn.inference import Translator

MAX_LENGTH = 200  # as fairseq-generate's --max-len-b
Engine = Callable[[List[torch.Tensor]], Callable[[], List[List[int]]]]  # from a batch to what is timed


def translator(args: argparse.Namespace, dictionary: Dictionary) -> Engine:
    """Return this package's translator."""
    (model,), _ = load_model_ensemble([args.checkpoint], {"data": args.data})
    engine = Translator(model.eval())
    native = engine.native(args.compute_type)
    if native is None:
        raise SystemExit(f"the model has no native translator: {engine.reason}")
    eos, pad, unk = dictionary.eos(), dictionary.pad(), dictionary.unk()
    search = (args.beam, 1, MAX_LENGTH, eos, pad, eos, unk, 0.0, 1.0, True, None, 1.0)

    def prepare(batch: List[torch.Tensor]) -> Callable[[], List[List[int]]]:
        src_tokens = data_utils.collate_tokens(batch, pad, eos, left_pad=True)

        def run() -> List[List[int]]:
            counts, lengths, _, found, *_ = engine.search(native, src_tokens, *search)
            words, ends = found.tolist(), list(itertools.accumulate(lengths.tolist(), initial=0))
            best = itertools.accumulate(counts.tolist()[:-1], initial=0)
            return [words[ends[i] : ends[i + 1] - 1] for i in best]

        return run

    return prepare


def ctranslate2(args: argparse.Namespace, dictionary: Dictionary) -> Engine:
    """Return CTranslate2, which reads and writes words."""
    (model,), _ = load_model_ensemble([args.checkpoint], {"data": args.data})
    threads = {"inter_threads": 1, "intra_threads": args.threads}
    engine = peer(model.eval(), dictionary, args.compute_type, **threads)

    def prepare(batch: List[torch.Tensor]) -> Callable[[], List[List[int]]]:
        sources = [[dictionary[word] for word in sentence[:-1].tolist()] for sentence in batch]

        def run() -> List[List[int]]:
            found = engine.translate_batch(sources, beam_size=args.beam, max_decoding_length=MAX_LENGTH)
            return [[dictionary.index(word) for word in result.hypotheses[0]] for result in found]

        return run

    return prepare


def main() -> None:
    """Read the command line, load, translate, print."""
    engines: Any = {engine.__name__: engine for engine in (translator, ctranslate2)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=list(engines))
    for name in ("data", "checkpoint", "source", "target"):
        parser.add_argument(name)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compute-type", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pair = f"{args.data}/test.{args.source}-{args.target}"
    dictionary = Dictionary.load(f"{args.data}/dict.{args.target}.txt")
    sources, targets = (
        data_utils.load_indexed_dataset(f"{pair}.{language}", dictionary)
        for language in (args.source, args.target)
    )
    order = np.lexsort((targets.sizes, sources.sizes)).tolist()  # fairseq-generate's
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    engine = engines[args.engine](args, dictionary)
    calls = [engine([sources[i] for i in batch]) for batch in batches]
    calls[0]()  # warms up

    begin = time.perf_counter()
    results = [call() for call in calls]
    seconds = time.perf_counter() - begin
    found = {i: words for batch, result in zip(batches, results) for i, words in zip(batch, result)}
    for i in sorted(found):
        print(f"D-{i}\t0\t{dictionary.string(torch.tensor(found[i]), 'sentencepiece')}")
    print(f"Translated {len(found)} sentences in {seconds:.1f}s ({len(found) / seconds:.2f} sentences/s)")


if __name__ == "__main__":
    main()
