"""Compare how fast an untrained lrn_wmt_en_de and fairseq's Transformer of its width translate on a GPU.

    python decoding_cuda.py [--beam 4 1] [--batch-size 1 128] [--dtype float32 float16] [--json FILE]

All sentences and translations have 25 words, and all contenders make 26 steps, the last for </s>. The
contenders take turns, and the table has medians. A contender that fails is named and left out. CTranslate2
takes part in float16 if it is installed. Without a card all runs at tiny sizes on the CPU.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import torch
from arguments import output, positive
from benchmark import environment
from benchmark_cuda import CUDA, DEVICE, card
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from models import build, make_dictionary, peer
from torch import nn

from fairseq_lrn.inference import BeamSearchGenerator, Translator

WORDS, VOCABULARY = (25, 32000) if CUDA else (4, 60)
ARCHITECTURES = {
    "lrn": ("lrn_wmt_en_de", {}),
    "transformer": (
        "transformer_wmt_en_de",
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
    ),
}
TINY = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("embed_dim", 16), ("ffn_embed_dim", 16), ("layers", 1), ("attention_heads", 2))
}


class Plain(BeamSearchGenerator):
    """This package's generator, with kernels launched one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.translator = Translator(self.model.single_model)
        self.translator.graphs = SimpleNamespace(search=lambda *_: None)


CONTENDERS = {
    "transformer": ("transformer", SequenceGenerator),
    "lrn, fairseq's generator": ("lrn", SequenceGenerator),
    "lrn, lrn_translation without graphs": ("lrn", Plain),
    "lrn, lrn_translation": ("lrn", BeamSearchGenerator),
}
PEER = "transformer, CTranslate2"


def ready(name: str, dictionary: Dictionary, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Return an untrained model of the architecture ``name`` that is ready to translate."""
    torch.manual_seed(0)
    positions = {"max_source_positions": 1024, "max_target_positions": 1024}
    model = build(name, dictionary, **positions, **options).eval().to(DEVICE, dtype)
    model.make_generation_fast_()
    return model


def attempt(name: str, make: Callable[[], Any], failures: Dict[str, str]) -> Any:
    """Return the result of ``make``, or None after printing why."""
    try:
        return make()
    except Exception as error:  # the other contenders' figures are wanted all the same
        failures[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"{name} left out: {failures[name]}", file=sys.stderr, flush=True)
        if CUDA and not isinstance(error, ImportError):
            traceback.print_exc()
        return None


def seconds() -> float:
    """Return the time, once the card has done its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    dictionary: Dictionary,
    dtype: torch.dtype,
    models: Dict[str, nn.Module],
    translator: Any,
    beam: int,
    batch_size: int,
    rounds: int,
    failures: Dict[str, str],
) -> Dict[str, Dict[str, float]]:
    """Translate a batch by each contender in its turn.

    Returns:
        for each contender ``seconds``, the median time of a batch, and ``first``, that of the first batch
    """
    source = torch.randint(dictionary.nspecial, len(dictionary), (batch_size, WORDS + 1))
    source[:, -1] = dictionary.eos()
    words = [[dictionary[word] for word in row[:-1]] for row in source.tolist()]
    source = source.to(DEVICE)
    lengths = torch.full((batch_size,), WORDS + 1, device=DEVICE)
    calls: Dict[str, Callable[[], Any]] = {}

    def by(generator: Any) -> Callable[[], Any]:
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}

        def call() -> None:
            found = generator.generate([], sample)
            assert all(len(beam[0]["tokens"]) == WORDS + 1 for beam in found)

        return call

    for name, (model, kind) in CONTENDERS.items():
        options = {"beam_size": beam, "max_len_b": WORDS, "min_len": WORDS}
        calls[name] = by(kind([models[model]], dictionary, **options))
    if translator is not None:
        calls[PEER] = lambda: translator.translate_batch(
            words,
            beam_size=beam,
            max_batch_size=batch_size,
            min_decoding_length=WORDS + 1,  # of words that are not </s>: it makes none at the limit
            max_decoding_length=WORDS + 1,
        )
    title = f"{str(dtype)[6:]}, beam {beam}, batch {batch_size}"
    first: Dict[str, float] = {}
    for name in list(calls):
        began = seconds()
        if attempt(f"{name}, {title}", lambda call=calls[name]: (call(), call()), failures) is None:
            del calls[name]
        first[name] = seconds() - began
    times: Dict[str, List[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = seconds()
            call()
            times[name].append(seconds() - began)
    return {
        name: {"seconds": statistics.median(values), "first": first[name]} for name, values in times.items()
    }


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beam", type=positive, nargs="+", default=[4, 1])
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 128])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "float16"], choices=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=output, help="file for every measurement")
    args = parser.parse_args()

    dictionary = make_dictionary(VOCABULARY)
    facts = {**environment(), **card(), "words": WORDS, "vocabulary": VOCABULARY}
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    print("\n| dtype, beam, batch | contender | sentences/s | ms a step | ÷ transformer | first two, s |")
    print("|---|---|---|---|---|---|", flush=True)
    failures: Dict[str, str] = {}
    measured = []
    for dtype in [getattr(torch, name) for name in args.dtype]:
        sizes = {} if CUDA else TINY
        models = {
            name: ready(arch, dictionary, dtype, **options, **sizes)
            for name, (arch, options) in ARCHITECTURES.items()
        }
        translator = None
        if dtype == torch.float16 or not CUDA:
            translator = attempt(
                f"{PEER}, {str(dtype)[6:]}",
                lambda: peer(models["transformer"].float().cpu(), dictionary, str(dtype)[6:], device=DEVICE),  # noqa: B023
                failures,
            )
            models["transformer"].to(DEVICE, dtype)
        for batch_size in args.batch_size:
            for beam in args.beam:
                found = measure(
                    dictionary, dtype, models, translator, beam, batch_size, args.rounds, failures
                )
                base = found.get("transformer", {"seconds": math.nan})["seconds"]
                title = f"{str(dtype)[6:]}, {beam}, {batch_size}"
                for name, one in found.items():
                    row = [title, name, f"{batch_size / one['seconds']:.1f}"]
                    row += [f"{1000 * one['seconds'] / (WORDS + 1):.3f}", f"{base / one['seconds']:.2f}"]
                    print("| " + " | ".join([*row, f"{one['first']:.2f}"]) + " |", flush=True)
                    setting = {"dtype": str(dtype)[6:], "beam": beam, "batch_size": batch_size}
                    measured.append({**setting, "contender": name, **one})
                if args.json:
                    report = {"environment": facts, "failures": failures, "measured": measured}
                    args.json.write_text(json.dumps(report, indent=1))
    if not CUDA:
        print("There is no CUDA card: tiny sizes were tried out on the CPU, and the times say nothing.")


if __name__ == "__main__":
    main()
