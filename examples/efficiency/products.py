"""Time the products with weights of each compute type beside PyTorch's, on one thread.

A product maps (rows, in) to (rows, out). The table has multiplications a second, in thousands of millions, by
the processor's time and the median of the repetitions.
"""

import argparse
import statistics
import time
import warnings
from typing import Callable, Dict, Tuple

import torch
from arguments import positive
from torch import Tensor, nn

from fairseq_lrn.inference import COMPUTE_TYPES

Shape = Tuple[int, int, int]


def contenders(shape: Shape) -> Dict[str, Callable[[], Tensor]]:
    """By their names, functions of nothing that compute one product."""
    rows, inputs, outputs = shape
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    found: Dict[str, Callable[[], Tensor]] = {}
    for name in COMPUTE_TYPES:
        product = torch.classes.fairseq_lrn.Product(layer.weight.detach(), layer.bias.detach(), name)
        found[name] = lambda product=product: product.forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        int8 = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
    bfloat16, rounded = nn.Linear(inputs, outputs, dtype=torch.bfloat16), x.bfloat16()
    found["PyTorch float32"] = lambda: layer(x)
    found["PyTorch bfloat16"] = lambda: bfloat16(rounded)
    found["PyTorch int8"] = lambda: int8(x)
    return found


@torch.no_grad()
def measure(shape: Shape, repetitions: int) -> Dict[str, float]:
    """Multiplications a second of each contender, in thousands of millions; they take turns."""
    functions, count = contenders(shape), shape[0] * shape[1] * shape[2]
    calls = min(2000, 1 + 10**8 // count)
    times: Dict[str, list] = {name: [] for name in functions}
    for _ in range(1 + repetitions):  # the first one warms up
        for name, function in functions.items():
            began = time.process_time()
            for _ in range(calls):
                function()
            times[name].append((time.process_time() - began) / calls)
    return {name: count / statistics.median(some[1:]) / 1e9 for name, some in times.items()}


def shape(text: str) -> Shape:
    """Read ROWS,IN,OUT."""
    rows, inputs, outputs = map(positive, text.split(","))
    return rows, inputs, outputs


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [(640, 128, 7800), (60, 128, 384), (5, 128, 384), (1, 128, 7800), (60, 512, 1536)]
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="ROWS,IN,OUT", default=shapes)
    parser.add_argument("--repetitions", type=positive, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"instruction set {torch.ops.fairseq_lrn.cpu_capability()}, torch {torch.__version__}")
    for i, one in enumerate(args.shapes):
        found = measure(one, args.repetitions)
        if i == 0:
            print("| rows, in, out | " + " | ".join(found) + " |" + "\n|" + "---|" * (1 + len(found)))
        print(
            f"| {', '.join(map(str, one))} | " + " | ".join(f"{x:.0f}" for x in found.values()) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
