"""Time an LRN layer beside its matrix product alone and other recurrent layers, float32 on the CPU.

Every contender maps (T, B, D) to D features a step. In each repetition every contender runs once. Each
repetition starts with another one, so a drift of the machine's speed affects all alike. The tables have
medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch
from arguments import output, positive
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lrn.modules import LRN
from fairseq_lrn.ops import lrn_scan_reference

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tries to compile for CUDA too
        import sru
    warnings.filterwarnings("ignore", message="Running SRU on CPU")
    without_sru = ""
except Exception as error:  # it compiles when it is imported, so anything can go wrong
    without_sru = f"{type(error).__name__}: {error}".splitlines()[0]

PASSES = ("fwd", "fwd+bwd")
Contenders = Dict[str, Tuple[Callable[[Tensor, Tensor], Tensor], List[Tensor]]]


def make_contenders(size: int) -> Contenders:
    """Each contender's function of the input (T, B, size) and the padding mask (B, T), and its parameters."""
    lrn, lstm, gru = LRN(size, size), nn.LSTM(size, size), nn.GRU(size, size)
    weight, bias = lrn.weight_ih_l0, lrn.bias_ih_l0

    def lstm_by(onednn: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, mask: Tensor) -> Tensor:
            torch.backends.mkldnn.enabled = onednn
            try:
                return lstm(x)[0]
            finally:
                torch.backends.mkldnn.enabled = True

        return run

    contenders: Contenders = {
        "LRN, padding mask": (lambda x, mask: lrn(x, padding_mask=mask)[0], list(lrn.parameters())),
        "its projection alone": (lambda x, mask: F.linear(x, weight, bias), [weight, bias]),
        "nn.LSTM, oneDNN": (lstm_by(True), list(lstm.parameters())),
        "nn.LSTM, without oneDNN": (lstm_by(False), list(lstm.parameters())),
        "nn.GRU": (lambda x, mask: gru(x)[0], list(gru.parameters())),
        "LRN, reference loop": (
            lambda x, mask: lrn_scan_reference(F.linear(x, weight, bias), None, mask),
            [weight, bias],
        ),
    }
    if not without_sru:
        unit = sru.SRU(size, size, num_layers=1)
        contenders["SRU"] = (lambda x, mask: unit(x)[0], list(unit.parameters()))
    return contenders


def make_inputs(steps: int, batch: int, size: int) -> Tuple[Tensor, Tensor, Dict[int, Tensor]]:
    """An input, a mask that pads the ends of sequences, and a gradient for either output width."""
    lengths = torch.randint((steps + 1) // 2, steps + 1, (batch, 1))
    mask = torch.arange(steps) >= lengths
    gradients = {width: torch.randn(steps, batch, width) for width in (size, 3 * size)}
    return torch.randn(steps, batch, size, requires_grad=True), mask, gradients


def measure(shape: Tuple[int, int, int], repetitions: int) -> Dict[str, Dict[str, List[float]]]:
    """Milliseconds of every repetition, by contender and pass."""
    contenders = make_contenders(shape[2])
    inputs = [make_inputs(*shape) for _ in range(3)]
    names = list(contenders)
    times: Dict[str, Dict[str, List[float]]] = {name: {kind: [] for kind in PASSES} for name in names}
    for repetition in range(-1, repetitions):  # the first one warms up
        x, mask, gradients = inputs[repetition % len(inputs)]
        start = repetition % len(names)
        for kind in PASSES:
            for name in names[start:] + names[:start]:
                function, parameters = contenders[name]
                began = time.perf_counter()
                with torch.set_grad_enabled(kind == "fwd+bwd"):
                    output = function(x, mask)
                if kind == "fwd+bwd":
                    torch.autograd.grad(output, [x, *parameters], gradients[output.size(2)])
                elapsed = 1000 * (time.perf_counter() - began)
                if repetition >= 0:
                    times[name][kind].append(elapsed)
    return times


def environment() -> Dict[str, str]:
    """The environment that the figures depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=str(here), capture_output=True, text=True
    )
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lrn_scan": "compiled" if hasattr(torch.ops.fairseq_lrn, "lrn_scan") else "reference",
        "sru": f"left out ({without_sru})" if without_sru else sru.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def table(shape: Tuple[int, int, int], by_threads: Dict[int, Dict[str, Dict[str, List[float]]]]) -> str:
    """Markdown: a row a contender; milliseconds and their ratio to LRN's, by threads and pass."""
    columns = [(threads, kind) for threads in by_threads for kind in PASSES]
    header = [f"{kind} ms, {threads} thread{'s' * (threads > 1)} | ÷ LRN" for threads, kind in columns]
    rows = [f"| T={shape[0]}, B={shape[1]}, D={shape[2]} | " + " | ".join(header) + " |"]
    rows.append("|---" * (1 + 2 * len(columns)) + "|")
    names = list(next(iter(by_threads.values())))
    for name in names:
        cells = [name]
        for threads, kind in columns:
            own, lrn = (statistics.median(by_threads[threads][n][kind]) for n in (name, names[0]))
            cells += [f"{own:.1f}", f"{own / lrn:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def shape(text: str) -> Tuple[int, int, int]:
    """Read T,B,D."""
    steps, batch, size = map(positive, text.split(","))
    return steps, batch, size


def main() -> None:
    """Read the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="T,B,D",
        default=[(50, 80, 512), (25, 160, 512), (100, 32, 256)],
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2])
    parser.add_argument("--repetitions", type=positive, default=15)
    parser.add_argument(
        "--json", type=output, metavar="PATH", help="write every repetition's milliseconds here"
    )
    args = parser.parse_args()

    facts = environment()
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    results = []
    for steps, batch, size in args.shapes:
        by_threads = {}
        for threads in args.threads:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            by_threads[threads] = measure((steps, batch, size), args.repetitions)
            results.append({"shape": [steps, batch, size], "threads": threads, "ms": by_threads[threads]})
        print("\n" + table((steps, batch, size), by_threads), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
