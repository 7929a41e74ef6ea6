"""Measure the speed columns of the paper's translation table: a model with each recurrent unit.

    python units.py [--scale paper] [--model lrn] [--json FILE] [--plot FILE.png]

The units take turns. On the CPU each measurement is a separate process, to get its peak of memory.
"""

import argparse
import gc
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

import torch
from arguments import output, picture, positive
from models import build, make_dictionary

from fairseq_lrn.modules import CELLS
from fairseq_lrn.tasks.translation import BeamSearchGenerator

# Environment of each measurement, as in ../recipe.sh
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}

# Zhang and Sennrich (2019): millions of parameters, training s/batch, decoding ms/sentence
PAPER = {
    "lrn": (143, 0.99, 36.50),
    "olrn": (164, 1.15, 40.19),
    "gru": (206, 2.67, 45.35),
    "atr": (122, 1.33, 34.40),
    "sru": (170, 1.34, 42.84),
}
SCALES = {
    "small": {"width": 128, "layers": 4, "words": 2700, "sentences": 80, "length": 25, "updates": 6},
    "paper": {"width": 1024, "layers": 6, "words": 32000, "sentences": 80, "length": 50, "updates": 20},
}


def measure(cell: str, model: str, scale: Dict[str, int], device: str) -> Dict[str, float]:
    """Train and translate with random sentences, up to a sixth of them padding. Translations are as long.

    Returns:
        parameters; train, seconds a batch, with the update; decode, milliseconds a sentence, beam 4, in one
        batch; memory, the peak of training in MiB, beyond the process's at the start
    """
    cuda = device == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def seconds() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    torch.manual_seed(0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dictionary = make_dictionary(scale["words"])
    options = {"cell": cell, "share_decoder_input_output_embed": True}
    for side in ("encoder", "decoder"):
        options.update({f"{side}_embed_dim": scale["width"], f"{side}_layers": scale["layers"]})
    net = build(model, dictionary, **options).to(device)
    optimizer = torch.optim.Adam(net.parameters())

    def tokens() -> torch.Tensor:
        size = (scale["sentences"], scale["length"])
        words = torch.randint(dictionary.nspecial, len(dictionary), size)
        last = torch.randint(scale["length"] * 5 // 6, scale["length"], size[:1])[:, None]
        last[0] = scale["length"] - 1
        words.scatter_(1, last, dictionary.eos())
        return words.masked_fill(torch.arange(scale["length"]) > last, dictionary.pad()).to(device)

    train: List[float] = []
    for _ in range(2 + scale["updates"]):
        source, target = tokens(), tokens()
        previous = target.masked_fill(target.eq(dictionary.eos()), dictionary.pad()).roll(1, 1)
        previous[:, 0] = dictionary.eos()
        began = seconds()
        scores, _ = net(source, None, previous)
        torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), target.flatten(), ignore_index=dictionary.pad(), label_smoothing=0.1
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        train.append(seconds() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else (peak - start) / 1024

    net.make_generation_fast_()
    length = scale["length"]
    generator = BeamSearchGenerator([net], dictionary, beam_size=4, max_len_b=length, min_len=length)
    decode: List[float] = []
    for _ in range(2):
        source = tokens()
        lengths = source.ne(dictionary.pad()).sum(1)
        began = seconds()
        generator.generate([net], {"net_input": {"src_tokens": source, "src_lengths": lengths}})
        decode.append(1000 * (seconds() - began) / len(source))
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "train": statistics.median(train[2:]),
        "decode": decode[-1],
        "memory": memory,
    }


def table(results: Dict[str, Dict[str, float]]) -> str:
    """Markdown: a row for each unit, with the measurements, their ratios to LRN's, and the paper's ratios."""
    lines = [
        "| unit | parameters | training s/batch | ÷ LRN | paper | decoding ms/sentence | ÷ LRN | paper "
        "| memory MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, result in results.items():
        row = [cell, f"{result['parameters']:,}"]
        for column, (name, digits) in enumerate((("train", 3), ("decode", 1)), 1):
            paper = f"{PAPER[cell][column] / PAPER['lrn'][column]:.2f}" if cell in PAPER else ""
            row += [f"{result[name]:.{digits}f}", f"{result[name] / results['lrn'][name]:.2f}", paper]
        lines.append("| " + " | ".join([*row, f"{result['memory']:.0f}"]) + " |")
    return "\n".join(lines)


def plot(results: Dict[str, Dict[str, float]], path: Path) -> None:
    """Draw the ratios to LRN, beside the paper's."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes every logger tell all
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for column, (name, title) in enumerate((("train", "training"), ("decode", "decoding")), 1):
        for shift, label in ((-0.2, "here"), (0.2, "paper")):
            cells = [cell for cell in results if label == "here" or cell in PAPER]
            ratios = [
                results[cell][name] / results["lrn"][name]
                if label == "here"
                else PAPER[cell][column] / PAPER["lrn"][column]
                for cell in cells
            ]
            places = [list(results).index(cell) + shift for cell in cells]
            bars = axes[column - 1].bar(places, ratios, 0.4, label=label)
            axes[column - 1].bar_label(bars, fmt="%.2f", fontsize=7)
        axes[column - 1].set_xticks(range(len(results)), [cell.upper() for cell in results])
        axes[column - 1].set_title(f"{title} time ÷ LRN's")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def sizes(text: str) -> Dict[str, int]:
    """Read sizes of a scale, as JSON."""
    read, known = json.loads(text), SCALES["small"]
    if not isinstance(read, dict) or read.keys() - known.keys():
        raise argparse.ArgumentTypeError(f"{text} must be an object of {', '.join(known)}")
    return {name: positive(str(size)) for name, size in read.items()}


def main() -> None:
    """Read the command line, measure the units in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small", help="paper: for a GPU (default: small)")
    parser.add_argument("--model", choices=["deepnmt", "lrn"], default="deepnmt")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each unit; tables show medians")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--json", type=output, help="file for every measurement")
    parser.add_argument("--plot", type=picture, help="file for a picture of the ratios")
    parser.add_argument("--sizes", type=sizes, default={}, help="replace sizes of the scale, as JSON")
    parser.add_argument("--measure", choices=CELLS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    if args.measure:
        scale = {**SCALES[args.scale], **args.sizes}
        print(json.dumps(measure(args.measure, args.model, scale, device)))
        return

    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    environment = {"device": machine, "torch": torch.__version__, "threads": args.threads}
    measured: Dict[str, List[Dict[str, float]]] = {cell: [] for cell in CELLS}

    def keep(cell: str, result: Dict[str, float]) -> None:
        measured[cell].append(result)
        if args.json:
            args.json.write_text(json.dumps({"environment": environment, "measured": measured}, indent=1))

    for i in range(args.rounds):
        for cell in CELLS[i % len(CELLS) :] + CELLS[: i % len(CELLS)]:
            print(f"round {i + 1} of {args.rounds}: {cell}", file=sys.stderr, flush=True)
            if device == "cuda":  # PyTorch counts the card's memory
                keep(cell, measure(cell, args.model, {**SCALES[args.scale], **args.sizes}, device))
                continue
            words = [sys.executable, __file__, *sys.argv[1:], "--measure", cell]
            run = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **KEEP_MEMORY}
            )
            keep(cell, json.loads(run.stdout.splitlines()[-1]))
    medians = {
        cell: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for cell, rounds in measured.items()
    }
    print(json.dumps({"model": args.model, **SCALES[args.scale], **args.sizes, **environment}), "\n")
    print(table(medians))
    if args.plot:
        plot(medians, args.plot)


if __name__ == "__main__":
    main()
