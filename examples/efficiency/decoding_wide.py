"""Compare how fast untrained models of width 512 translate on the CPU: an lrn and fairseq's Transformer.

    python decoding_wide.py [--beam 5 1] [--batch-size 1 128] [--rounds 3] [--json FILE]

They are lrn_iwslt_de_en and transformer_iwslt_de_en, normalising before: 6 + 6 layers, a vocabulary of 8,000.
All sentences have 14 words and all translations 20. The contenders take turns, on one thread. CTranslate2
takes part if it is installed. Its 21st step makes a word, and that of the others makes </s>.
"""

import argparse
import json
import statistics
import time
from typing import Any, Callable, Dict, List

import torch
from arguments import output, positive
from decoding_cuda import attempt, ready
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from models import make_dictionary, peer

from fairseq_lrn.inference import COMPUTE_TYPES, BeamSearchGenerator

WORDS, SOURCE, VOCABULARY = 20, 14, 8000


def contenders(
    models: Dict[str, Any], engines: Dict[str, Any], dictionary: Dictionary, beam: int, rows: int
) -> Dict[str, Callable[[], Any]]:
    """By their names, functions of nothing that translate one batch."""
    torch.manual_seed(0)
    source = torch.randint(dictionary.nspecial, len(dictionary), (rows, SOURCE + 1))
    source[:, -1] = dictionary.eos()
    words = [[dictionary[word] for word in row[:-1]] for row in source.tolist()]
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.full((rows,), SOURCE + 1)}}
    options = {"beam_size": beam, "max_len_b": WORDS, "min_len": WORDS}
    calls: Dict[str, Callable[[], Any]] = {}
    generator = SequenceGenerator([models["transformer"]], dictionary, **options)
    calls["transformer"] = lambda: generator.generate([], sample)
    for compute_type in COMPUTE_TYPES:
        ours = BeamSearchGenerator([models["lrn"]], dictionary, compute_type=compute_type, **options)
        calls[f"lrn, lrn_translation, {compute_type}"] = lambda ours=ours: ours.generate([], sample)
    for compute_type, engine in engines.items():
        calls[f"transformer, CTranslate2, {compute_type}"] = lambda engine=engine: engine.translate_batch(
            words, beam_size=beam, min_decoding_length=WORDS + 1, max_decoding_length=WORDS + 1
        )
    return calls


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beam", type=positive, nargs="+", default=[5, 1])
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=output, help="file for every measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)

    dictionary = make_dictionary(VOCABULARY)
    both = {f"{side}_normalize_before": True for side in ("encoder", "decoder")}
    models = {
        "lrn": ready("lrn_iwslt_de_en", dictionary, torch.float32, share_all_embeddings=True),
        "transformer": ready(
            "transformer_iwslt_de_en", dictionary, torch.float32, share_all_embeddings=True, **both
        ),
    }
    engines: Dict[str, Any] = {}
    for compute_type in ("float32", "int8"):
        engine = attempt(
            f"CTranslate2, {compute_type}",
            lambda: peer(models["transformer"], dictionary, compute_type, inter_threads=1, intra_threads=1),  # noqa: B023
            {},
        )
        engines.update({} if engine is None else {compute_type: engine})

    print("| beam, batch | contender | sentences/s | ÷ transformer |\n|---|---|---|---|", flush=True)
    measured = []
    for beam in args.beam:
        for rows in args.batch_size:
            calls = contenders(models, engines, dictionary, beam, rows)
            seconds: Dict[str, List[float]] = {name: [] for name in calls}
            for turn in range(args.rounds + 1):  # the first warms up
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    seconds[name] += [time.perf_counter() - begin] * (turn > 0)
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            for name, median in medians.items():
                ratio = medians["transformer"] / median
                print(f"| {beam}, {rows} | {name} | {rows / median:.1f} | {ratio:.2f} |", flush=True)
            measured.append({"beam": beam, "batch_size": rows, "seconds": seconds})
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
