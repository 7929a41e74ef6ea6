"""Translate a binarized test set with CTranslate2 and a checkpoint of fairseq's Transformer.

    python ctranslate2_generate.py DATA CHECKPOINT SOURCE TARGET [--beam 5] [--batch-size 128] [--every 1]

It prints what fairseq-generate prints of it: a line D for each sentence, and how many sentences it translated
in a second, without loading. Sentences are sorted by length; each batch is one call.
"""

import argparse
import tempfile
import time

import ctranslate2
import numpy as np
import torch
from fairseq.data import Dictionary, data_utils


def convert(checkpoint: str, data: str, source: str, target: str, folder: str) -> None:
    """Write the Transformer of ``checkpoint`` to ``folder``, as CTranslate2 reads it."""
    load = torch.load  # CTranslate2 does not say that fairseq's checkpoints hold more than weights
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})
    try:
        converter = ctranslate2.converters.FairseqConverter(
            checkpoint, data, source_lang=source, target_lang=target
        )
        converter.convert(folder, force=True)
    finally:
        torch.load = load


def main() -> None:
    """Read the command line, convert, translate, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "checkpoint", "source", "target"):
        parser.add_argument(name)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="translate one batch of so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compute-type", default="float32", help="of CTranslate2")
    args = parser.parse_args()

    pair = f"{args.data}/test.{args.source}-{args.target}"
    dictionary = Dictionary.load(f"{args.data}/dict.{args.source}.txt")
    sources, targets = (
        data_utils.load_indexed_dataset(f"{pair}.{language}", dictionary)
        for language in (args.source, args.target)
    )
    order = np.lexsort((targets.sizes, sources.sizes)).tolist()  # fairseq-generate's
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)][:: args.every]
    words = {i: [dictionary[word] for word in sources[i][:-1].tolist()] for batch in batches for i in batch}

    with tempfile.TemporaryDirectory() as folder:
        convert(args.checkpoint, args.data, args.source, args.target, folder)
        translator = ctranslate2.Translator(
            folder, compute_type=args.compute_type, inter_threads=1, intra_threads=args.threads
        )
    found = {}
    begin = time.perf_counter()
    for batch in batches:
        results = translator.translate_batch(
            [words[i] for i in batch], beam_size=args.beam, max_decoding_length=200
        )
        found.update(zip(batch, (result.hypotheses[0] for result in results)))
    seconds = time.perf_counter() - begin
    for i in sorted(found):
        print(f"D-{i}\t0\t{''.join(found[i]).replace('▁', ' ').strip()}")
    print(f"Translated {len(found)} sentences in {seconds:.1f}s ({len(found) / seconds:.2f} sentences/s)")


if __name__ == "__main__":
    main()
