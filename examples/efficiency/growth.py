"""How speed and memory of training grow with length and width: LRN beside the Transformer and nn.LSTM.

    python growth.py [--lengths 16 64 256] [--widths 128 256] [--json FILE] [--plot FILE.png]

Each model has 2 + 2 layers and reads random sentences of one length. LRN and LSTM are cells of ``lrn``. The
Transformer is fairseq's, normalising before. On the CPU they run in float32, on a GPU in float16.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from arguments import output, picture, positive
from models import build, make_dictionary

MODELS: Dict[str, Dict[str, Any]] = {
    "LRN": {"arch": "lrn"},
    "Transformer": {
        "arch": "transformer",
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
    },
    "LSTM": {"arch": "lrn", "cell": "lstm"},
}
CUDA = torch.cuda.is_available()
Point = Dict[str, Any]


def measure(name: str, length: int, width: int, tokens: int, words: int, seconds: float) -> Optional[Point]:
    """Train ``name`` on batches of ``tokens`` target words, in sentences of ``length``.

    Returns:
        words_per_second, the median of the steps, and memory, the peak in MiB beyond the process's at the
        start; None if a GPU has too little memory
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if CUDA else "cpu")
    dictionary = make_dictionary(words)
    options = {
        **MODELS[name],
        "share_all_embeddings": True,
        "dropout": 0.1,
        "checkpoint_activations": False,
        "max_source_positions": length,
        "max_target_positions": length,
    }
    for side in ("encoder", "decoder"):
        sizes = {
            "embed_dim": width,
            "ffn_embed_dim": 2 * width,
            "layers": 2,
            "attention_heads": max(width // 64, 1),
        }
        options.update({f"{side}_{option}": size for option, size in sizes.items()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    size = max(1, tokens // length)
    times: List[float] = []
    try:
        model = build(options["arch"], dictionary, **options).to(device, torch.float16 if CUDA else None)
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        source, previous, target = (
            torch.randint(dictionary.nspecial, words, (size, length), device=device) for _ in range(3)
        )
        while len(times) < 3 or sum(times) < seconds:
            start = time.perf_counter()
            scores, _ = model(source, torch.full((size,), length, device=device), previous)
            torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), target.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if CUDA:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() / 2**20 if CUDA else (peak - before) / 1024
    rate = size * length / statistics.median(times[1:])
    return {"model": name, "length": length, "width": width, "words_per_second": rate, "memory": memory}


def apart(*arguments: Any) -> Optional[Point]:
    """:func:`measure`; on the CPU in a separate process, to get its peak of memory."""
    if CUDA:
        return measure(*arguments)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, arguments)


def plot(points: Dict[str, List[Point]], path: Path) -> None:
    """Draw words a second and memory against length and width."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes every logger tell all
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharey="row")
    for column, axis in enumerate(("length", "width")):
        sizes = sorted({point[axis] for point in points[axis]})
        for row, (value, title) in enumerate((("words_per_second", "words a second"), ("memory", "MiB"))):
            for name in MODELS:
                found = [point for point in points[axis] if point["model"] == name]
                axes[row, column].loglog(
                    [x[axis] for x in found], [x[value] for x in found], "o-", label=name
                )
            axes[row, column].set_xticks(sizes, map(str, sizes))
            axes[row, column].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes[row, column].set_xlabel(f"{axis}, {'tokens' if axis == 'length' else 'units'}")
            axes[row, column].set_ylabel(title)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, measure each point, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--widths", type=positive, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--length", type=positive, default=64, help="sentence length as width grows")
    parser.add_argument("--width", type=positive, default=512 if CUDA else 128, help="width as length grows")
    parser.add_argument(
        "--tokens", type=positive, default=32768 if CUDA else 4096, help="target words a batch"
    )
    parser.add_argument("--words", type=positive, default=1000, help="words of the vocabulary")
    parser.add_argument("--seconds", type=float, default=0.5, help="for a measurement; at least three steps")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--json", type=output, help="file for every measurement")
    parser.add_argument("--plot", type=picture, help="file for a picture")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    environment = {
        "device": machine,
        "torch": torch.__version__,
        "threads": args.threads,
        "tokens": args.tokens,
    }
    print(json.dumps(environment), "\n\n| model | length | width | words/s | MiB |\n|---|---|---|---|---|")
    points: Dict[str, List[Point]] = {"length": [], "width": []}
    places = [("length", length, args.width) for length in args.lengths]
    places += [("width", args.length, width) for width in args.widths]
    for name in MODELS:
        measure(name, 16, 64, 64, args.words, 0)  # libraries load
    for axis, length, width in places:
        for name in MODELS:
            point = apart(name, length, width, args.tokens, args.words, args.seconds)
            numbers = "- | -"
            if point:
                points[axis].append(point)
                numbers = f"{point['words_per_second']:,.0f} | {point['memory']:,.0f}"
            print(f"| {name} | {length} | {width} | {numbers} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, **points}, indent=1))
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
