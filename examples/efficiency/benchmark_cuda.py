"""Time LRN on a CUDA card against the card's copy bandwidth and beside other recurrent layers, in one table.

operator  lrn_scan alone, beside the kernels of SRU, of flash-linear-attention's HGRN and of torch.compile
layer     one LRN layer, forward and backward, beside cuDNN's LSTM and GRU
training  words a second of fairseq-train --fp16, beside fairseq's lstm and transformer, and a step's kernels

Times are the medians of CUDA events around passes over several sets of inputs. Together the sets are larger
than the card's cache. Contenders take turns. A pass is one CUDA graph, except for kernels that cannot be
captured. Without a card all runs once at tiny sizes on the CPU, which only shows that the script works.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from arguments import output, positive
from benchmark import environment
from torch import Tensor, nn

import fairseq_lrn
from fairseq_lrn.modules import LRN
from fairseq_lrn.ops import lrn_scan, lrn_scan_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Shape = Tuple[int, int, int]


class Contender(NamedTuple):
    """The timed part: ``call`` of each of the ``inputs``, and the bytes that one call must move."""

    call: Callable[..., Any]
    inputs: List[Tuple[Any, ...]]
    bytes: int = 0
    captured: bool = True


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ms: Optional[float]
    measured: str
    target: str = ""


def sets(bytes_of_one: int) -> int:
    """How many sets of inputs are needed, so that the card's cache does not hold the next call's input."""
    if not CUDA:
        return 2
    return max(3, math.ceil(8 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_of_one))


def random_tensors(count: int, *shapes: Tuple[int, ...], dtype: torch.dtype) -> List[Tuple[Tensor, ...]]:
    """``count`` tuples of normal tensors."""
    return [tuple(torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes) for _ in range(count)]


def one_pass(contender: Contender) -> Callable[[], None]:
    """A function that makes all the calls. Results stay, so no two calls write to the same memory."""
    results: List[Any] = [None] * len(contender.inputs)

    def run() -> None:
        for i, inputs in enumerate(contender.inputs):
            results[i] = contender.call(*inputs)

    if not (CUDA and contender.captured):
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.results = results  # the graph writes there
    return graph.replay


def measure(contenders: Dict[str, Contender], repetitions: int) -> Dict[str, float]:
    """Median milliseconds of one call of each, NaN where there is no card."""
    passes = {name: one_pass(contender) for name, contender in contenders.items()}
    if not CUDA:
        for run in passes.values():
            run()
        return dict.fromkeys(passes, math.nan)
    times: Dict[str, List[float]] = {name: [] for name in passes}
    names = list(passes)
    for repetition in range(-3, repetitions):  # the first ones warm up
        start = repetition % len(names)
        for name in names[start:] + names[:start]:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            passes[name]()
            after.record()
            after.synchronize()
            if repetition >= 0:
                times[name].append(before.elapsed_time(after) / len(contenders[name].inputs))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_contender(moved: int) -> Contender:
    """An elementwise kernel that reads half the bytes and writes the other half, as a copy does.

    It is not ``copy_``, which in a graph uses the card's copy engine and is slower.
    """
    tensors = random_tensors(sets(moved), (moved // 4,), (moved // 4,), dtype=torch.bfloat16)
    return Contender(lambda source, target: torch.neg(source, out=target), tensors, moved)


def scan_contenders(
    shape: Shape,
    dtype: torch.dtype,
    masked: bool = False,
    activation: str = "tanh",
    output_gate: bool = False,
    bidirectional: bool = False,
) -> Tuple[Contender, Contender]:
    """The operator's forward and backward. Bidirectional halves the state, so the number of lanes is the
    same."""
    steps, batch, size = shape
    parts = 4 if output_gate else 3
    element = steps * batch * size * dtype.itemsize
    mask_bytes = steps * batch * masked
    forward_bytes, backward_bytes = (parts + 1) * element, (2 * parts + 2) * element
    count = sets(forward_bytes)
    inputs = random_tensors(count, (steps, batch, parts * size), (steps, batch, size), dtype=dtype)
    lengths = torch.randint((steps + 1) // 2, steps + 1, (batch, 1), device=DEVICE)
    mask = torch.arange(steps, device=DEVICE) >= lengths if masked else None
    options = {"activation": activation, "output_gate": output_gate, "bidirectional": bidirectional}
    backward = torch.ops.fairseq_lrn.lrn_scan_backward
    outputs = [lrn_scan(x, None, mask, **options) for x, _ in inputs]
    return (
        Contender(lambda x: lrn_scan(x, None, mask, **options), [(x,) for x, _ in inputs],
                  forward_bytes + mask_bytes),
        Contender(lambda g, x, y: backward(g, x, y, None, mask, reverse=False, **options),
                  [(g, x, y) for (x, g), y in zip(inputs, outputs)], backward_bytes + mask_bytes),
    )  # fmt: skip


def sru_contenders(shape: Shape, dtype: torch.dtype) -> Tuple[Contender, Contender]:
    """SRU's kernels for one layer. They launch on the default stream, which graphs do not capture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it cannot compile for CUDA
        from sru.cuda_functional import elementwise_recurrence_forward
    steps, batch, size = shape
    element = steps * batch * size * dtype.itemsize
    shapes = ((steps, batch, 3 * size), (steps, batch, size), (steps, batch, size))
    inputs = random_tensors(sets(6 * element), *shapes, dtype=dtype)
    ((weight, bias, initial),) = random_tensors(1, (2 * size,), (2 * size,), (batch, size), dtype=dtype)

    def forward(u: Tensor, x: Tensor) -> Any:
        return elementwise_recurrence_forward(
            u, x, weight, bias, initial, 0, size, False, True, None, None, None
        )

    def backward(u: Tensor, x: Tensor, grad: Tensor, states: Tensor) -> Any:
        return torch.ops.sru_cuda.sru_backward_simple(
            u, x, weight, bias, initial, None, None, states, grad, initial, steps, batch, size
        )

    states = [forward(u, x)[2] for u, x, _ in inputs]
    return (
        Contender(forward, [(u, x) for u, x, _ in inputs], 6 * element, captured=False),
        Contender(backward, [(*xs, c) for xs, c in zip(inputs, states)], 10 * element, captured=False),
    )


def hgrn_contenders(shape: Shape, dtype: torch.dtype) -> Tuple[Contender, Contender]:
    """flash-linear-attention's recurrent HGRN kernels, whose gradients may be wider than the inputs."""
    from fla.ops.hgrn.fused_recurrent import fused_recurrent_hgrn_bwd, fused_recurrent_hgrn_fwd

    steps, batch, size = shape
    moved = 3 * steps * batch * size * dtype.itemsize  # forward: x, gate, y; backward: gate, y, grad
    inputs = random_tensors(sets(moved), *([(batch, steps, size)] * 3), dtype=dtype)
    inputs = [(x, nn.functional.logsigmoid(gate), grad) for x, gate, grad in inputs]
    outputs = [fused_recurrent_hgrn_fwd(x, gate)[0] for x, gate, _ in inputs]
    _, gate, grad = inputs[0]
    written = sum(x.nbytes for x in fused_recurrent_hgrn_bwd(gate, outputs[0], grad)[:2])
    return (
        Contender(fused_recurrent_hgrn_fwd, [(x, gate) for x, gate, _ in inputs], moved),
        Contender(fused_recurrent_hgrn_bwd, [(gate, y, grad) for (_, gate, grad), y in zip(inputs, outputs)],
                  moved + written),
    )  # fmt: skip


def layer_contenders(shape: Shape, dtype: torch.dtype, captured: bool) -> Dict[str, Contender]:
    """One layer's forward and backward, gradients of its input and of its parameters."""
    steps, batch, size = shape
    inputs = random_tensors(4, shape, shape, dtype=dtype)
    mask = torch.zeros(batch, steps, dtype=torch.bool, device=DEVICE)

    def contender(layer: nn.Module, **options: Any) -> Contender:
        layer.to(DEVICE, dtype)

        def call(x: Tensor, grad: Tensor) -> Any:
            return torch.autograd.grad(layer(x, **options)[0], [x, *layer.parameters()], grad)

        return Contender(call, [(x.detach().requires_grad_(), grad) for x, grad in inputs], captured=captured)

    return {
        "LRN": contender(LRN(size, size), padding_mask=mask),
        "nn.LSTM": contender(nn.LSTM(size, size)),
        "nn.GRU": contender(nn.GRU(size, size)),
    }


def describe(shape: Shape) -> str:
    """Name the sizes of a shape."""
    return "T={}, B={}, D={}".format(*shape)


def operator_rows(shape: Shape, repetitions: int) -> Iterator[Row]:
    """Forward and backward alone, and beside other kernels."""
    large = (shape[0], 4 * shape[1], shape[2])
    variants: List[Tuple[Shape, torch.dtype, Dict[str, Any]]] = [
        (shape, torch.bfloat16, {}),
        (large, torch.bfloat16, {}),
        (large, torch.bfloat16, {"masked": True}),
        (large, torch.bfloat16, {"activation": "identity"}),
        (large, torch.bfloat16, {"output_gate": True}),
        (large, torch.bfloat16, {"bidirectional": True}),
        (large, torch.float16, {}),
        (large, torch.float32, {}),
    ]
    copy = copy_contender(2**32 if CUDA else 64)
    copy_ms = measure({"copy": copy}, repetitions)["copy"]
    copy_rate = copy.bytes / copy_ms * 1e-9
    yield Row(f"copy of {copy.bytes // 2 >> 20} MiB", copy_ms, f"{copy_rate:.2f} TB/s")
    for size, dtype, options in variants:
        forward, backward = scan_contenders(size, dtype, **options)
        contenders = {"forward": forward, "backward": backward}
        copies = {f"copy, {name}": copy_contender(contender.bytes) for name, contender in contenders.items()}
        times = measure({**contenders, **copies}, repetitions)
        target = "≥ 0.85 of copy" if dtype == torch.bfloat16 and not options else ""
        words = [name if value is True else str(value) for name, value in options.items()]
        title = ", ".join([describe(size), str(dtype)[6:], *words])
        for name, contender in contenders.items():
            rate = contender.bytes / times[name] * 1e-9
            yield Row(
                f"{name}, {title}",
                times[name],
                f"{rate:.2f} TB/s, {rate / copy_rate:.2f} of copy, "
                f"{times[f'copy, {name}'] / times[name]:.2f} of a copy of as many bytes",
                target,
            )

    peers: List[Tuple[str, Callable[..., Tuple[Contender, Contender]], torch.dtype, bool]] = [
        ("SRU", sru_contenders, torch.float16, False),
        ("HGRN", hgrn_contenders, torch.bfloat16, True),
    ]
    for peer, make, dtype, per_byte in peers:
        try:
            theirs = make(large, dtype)
        except Exception as error:  # an optional package; what it cannot do is told in the table
            yield Row(f"{peer}'s kernels", None, f"left out ({type(error).__name__}: {error})".split("\n")[0])
            continue
        ours = scan_contenders(large, dtype)
        for name, our, their in zip(("forward", "backward"), ours, theirs):
            times = measure({"ours": our._replace(captured=their.captured), "theirs": their}, repetitions)
            ratio = times["theirs"] / times["ours"]
            if per_byte:
                ratio *= our.bytes / their.bytes
            unit, target = ("a byte", "≥ 1.2") if per_byte else ("a lane and step", "≥ 1.3")
            title = f"{peer}'s {name} kernel, {str(dtype)[6:]}"
            yield Row(title, times["theirs"], f"{ratio:.2f} times LRN's time {unit}", target)

    compiled = torch.compile(lrn_scan_reference, dynamic=False, backend="inductor" if CUDA else "eager")

    def forward_backward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
        return lambda x, grad: torch.autograd.grad(function(x), x, grad)

    shape = (shape[0] // 4, *shape[1:])  # compiling takes its time for every step
    pairs = random_tensors(3, (*shape[:2], 3 * shape[2]), shape, dtype=torch.bfloat16)
    pairs = [(x.requires_grad_(), grad) for x, grad in pairs]
    started = time.perf_counter()
    forward_backward(compiled)(*pairs[0])
    seconds = time.perf_counter() - started
    contenders = {
        "ours": Contender(forward_backward(lrn_scan), pairs),
        "theirs": Contender(forward_backward(compiled), pairs),
    }
    times = measure(contenders, repetitions)
    title = f"torch.compile of the reference, forward and backward, {describe(shape)}, bfloat16"
    measured = f"{times['theirs'] / times['ours']:.2f} times LRN's time; compiled in {seconds:.0f} s"
    yield Row(title, times["theirs"], measured, "report")


def layer_rows(shape: Shape, repetitions: int) -> Iterator[Row]:
    """LRN, LSTM and GRU layers, as graphs (the card alone) and launched one by one (as programs run them)."""
    for dtype in (torch.float16, torch.bfloat16):
        for captured, how in ((True, "one graph"), (False, "launched one by one")):
            times = measure(layer_contenders(shape, dtype, captured), repetitions)
            title = f"forward and backward, {describe(shape)}, {str(dtype)[6:]}, {how}"
            yield Row(f"LRN layer with padding mask, {title}", times["LRN"], "")
            for peer, target in (("nn.LSTM", "≥ 5"), ("nn.GRU", "≥ 4")):
                measured = f"{times[peer] / times['LRN']:.2f} times LRN's time"
                yield Row(f"{peer}, {title}", times[peer], measured, target)


def training_rows(width: int, layers: int, vocabulary: int, sentences: int, updates: int) -> Iterator[Row]:
    """Target words a second of fairseq-train on random sentences of 50 tokens, end of sentence included."""
    sizes = {f"--{side}-layers": layers for side in ("encoder", "decoder")}
    sizes.update({f"--{side}-embed-dim": width for side in ("encoder", "decoder")})
    wide = {f"--{side}-ffn-embed-dim": 4 * width for side in ("encoder", "decoder")}
    heads = max(1, width // 64)
    plugin = {"--user-dir": str(Path(fairseq_lrn.__file__).parent)}
    transformer = {"--arch": "transformer", **wide}
    transformer.update({f"--{side}-attention-heads": heads for side in ("encoder", "decoder")})
    lrn = {**plugin, "--arch": "lrn", **wide, "--decoder-attention-heads": heads}
    models: Dict[str, Dict[str, Any]] = {
        "transformer": transformer,
        "transformer, this package loaded": {**plugin, **transformer},
        "lrn": lrn,
        **({"lrn --compile": {**lrn, "--compile": ""}} if CUDA else {}),  # it takes long
        "lstm": {"--arch": "lstm", "--encoder-bidirectional": "", "--decoder-out-embed-dim": width,
                 **{f"--{side}-hidden-size": width for side in ("encoder", "decoder")}},
    }  # fmt: skip
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", sentences), ("valid", 8)):
            for language in ("en", "de"):
                lines = (
                    " ".join(f"w{rng.randrange(vocabulary - 4)}" for _ in range(49)) for _ in range(count)
                )
                Path(folder, f"{split}.{language}").write_text("\n".join(lines) + "\n")
        prefixes = [f"--{split}pref={folder}/{split}" for split in ("train", "valid")]
        command("-m", "fairseq_cli.preprocess", "-s", "en", "-t", "de", "--joined-dictionary", *prefixes,
                "--destdir", f"{folder}/bin")  # fmt: skip
        rates: Dict[str, float] = {}
        for name, options in models.items():
            flat = [word for pair in {**sizes, **options}.items() for word in pair if word != ""]
            out = command(
                str(Path(__file__).with_name("profile_training.py")), updates * 9 // 10, updates,
                f"{folder}/bin", *flat,
                "--share-all-embeddings", "--dropout", 0.1, "--optimizer", "adam", "--lr", 1e-4,
                "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1,
                "--max-tokens", 8192, "--max-update", updates, "--required-batch-size-multiple", 1,
                "--distributed-world-size", 1,
                "--no-save", "--disable-validation", "--log-format", "json",
                "--log-interval", updates // 4, "--seed", 1, "--fp16" if CUDA else "--cpu",
            )  # fmt: skip
            lines = out.splitlines()
            logs = [json.loads(line[line.index("{") :]) for line in lines if '"wps"' in line]
            inner = [float(log["wps"]) for log in logs if "train_wps" not in log]
            # the first quarter warms up, the last is profiled
            rates[name] = statistics.median(inner[1:3])
            parameters = next(line for line in lines if "shared model params" in line)
            parameters = parameters.rpartition("params: ")[2].split(" ")[0]
            profile = json.loads(next(line for line in lines if line.startswith('{"profile"')))
            yield Row(
                f"fairseq-train --fp16, {name}, {layers} + {layers} layers of width {width}, vocabulary of "
                f"{vocabulary:,}, {parameters} parameters",
                profile["profile"]["ms"],
                f"{rates[name]:,.0f} words/s, {rates[name] / rates['transformer']:.2f} of the "
                f"transformer's; {profile['profile']['kernels']:.0f} kernels a step",
            )
            for ms, count, kernel in profile["by_kernel"][:12]:
                yield Row(f"{name}: {kernel[:80]}", ms, f"{count:.0f} a step")


def command(*words: Any) -> str:
    """Run Python with these arguments and return its output. If it fails, exit with the last lines."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words[:2]))} exited with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def card() -> Dict[str, str]:
    """The card and its software, on which the figures also depend."""
    if not CUDA:
        return {"card": "none"}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
    )
    return {
        "card": torch.cuda.get_device_name(0),
        "driver": driver.stdout.strip() or "unknown",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("operator", "layer", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--repetitions", type=positive, default=30)
    parser.add_argument(
        "--json", type=output, metavar="PATH", help="write the table and the environment here"
    )
    args = parser.parse_args()
    if not hasattr(torch.ops.fairseq_lrn, "lrn_scan_backward"):
        sys.exit("the operators are not built: python setup.py build_ext --inplace")
    if CUDA and not torch._C._dispatch_has_kernel_for_dispatch_key("fairseq_lrn::lrn_scan", "CUDA"):
        sys.exit(
            "the operators are built without CUDA: FAIRSEQ_LRN_CUDA=1 python setup.py build_ext --inplace"
        )

    facts = {**environment(), **card()}
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if CUDA:
        print("\n| what | ms | measured | target |\n|---|---|---|---|", flush=True)
    rows: List[Row] = []
    for part in args.parts:
        if part == "operator":
            found = operator_rows((64, 64, 1024) if CUDA else (4, 2, 8), args.repetitions)
        elif part == "layer":
            found = layer_rows((50, 80, 1024) if CUDA else (3, 2, 8), args.repetitions)
        else:
            found = training_rows(*((1024, 6, 32000, 20000, 80) if CUDA else (8, 1, 40, 200, 4)))
        for row in found:
            rows.append(row)
            if CUDA:
                ms = "" if row.ms is None else f"{row.ms:.4f}"
                print(f"| {row.what} | {ms} | {row.measured} | {row.target} |", flush=True)
            if CUDA and args.json:
                report = {"environment": facts, "rows": [row._asdict() for row in rows]}
                args.json.write_text(json.dumps(report, indent=1))
        print(f"{part}: done", file=sys.stderr, flush=True)
    if not CUDA:
        print(f"Stopped before measuring: there is no CUDA card. {len(rows)} rows were tried out on the CPU.")


if __name__ == "__main__":
    main()
