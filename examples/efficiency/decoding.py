"""Compare how fast trained models translate on the CPU, by fairseq-generate.

    python decoding.py WORK RUN ... [--beam 5 1] [--batch-size 1 128] [--threads 1 2] [--rounds 3]

WORK is what a recipe of examples/translation wrote. RUN is the name of a training in it, or RUN:TASK to
translate with another task than `translation`. RUN:translator and RUN:ctranslate2 translate in process: an
LRN with this package's translator, a Transformer with CTranslate2 if that is installed. RUN:...-int8 computes
in int8. The runs take turns. Each measurement is a separate process.
"""

import argparse
import importlib.util
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

import fairseq
import torch
from arguments import output, picture, positive
from sacrebleu import corpus_bleu
from units import KEEP_MEMORY

import fairseq_lrn

PEER = "ctranslate2"
IN_PROCESS = Path(__file__).with_name("in_process.py")
Key = Tuple[int, int, int, str]  # threads, beam, batch size, run


def find(work: Path, run: str) -> Tuple[Path, Path, str, str]:
    """Return a run's checkpoint, the references of the test set and the two languages.

    Raises:
        SystemExit: something is missing
    """
    checkpoint = work / "runs" / run.partition(":")[0] / "checkpoint_average10.pt"
    if not checkpoint.exists():
        checkpoint = checkpoint.with_name("checkpoint_best.pt")
    if not checkpoint.exists():
        sys.exit(f"{run}: no {checkpoint}")
    indices = sorted((work / "bin").glob("test.*-*.*.idx"))
    if not indices:
        sys.exit(f"no test set in {work / 'bin'}")
    source, target = indices[0].name.split(".")[1].split("-")
    references = work / "text" / f"test.{target}"
    if not references.exists():
        sys.exit(f"no references of the test set: no {references}")
    return checkpoint, references, source, target


def measure(work: Path, threads: int, beam: int, batch_size: int, run: str) -> Dict[str, float]:
    """Translate the test set.

    Returns:
        sentences (their number), speed (sentences a second, without loading), bleu, and memory (MiB, the peak
        of the process)

    Raises:
        SystemExit: something is missing, or fairseq-generate fails
    """
    checkpoint, path, source, target = find(work, run)
    task, _, compute_type = run.partition(":")[2].partition("-")
    if task in (PEER, "translator"):
        command = IN_PROCESS.name
        words = [sys.executable, IN_PROCESS, task, work / "bin", checkpoint, source, target]
        words += ["--threads", threads]
    else:
        command = "fairseq-generate"
        words = [sys.executable, "-m", "fairseq_cli.generate", work / "bin", "--cpu"]
        words += ["--user-dir", Path(fairseq_lrn.__file__).parent, "--task", task or "translation"]
        words += ["-s", source, "-t", target, "--path", checkpoint, "--remove-bpe", "sentencepiece"]
        words += ["--required-batch-size-multiple", 1]
        words += ["--num-workers", 0]  # a process that reads ahead would take its share of the cores
    if compute_type:
        words += ["--compute-type", compute_type]
    words += ["--beam", beam, "--batch-size", batch_size]
    environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([str(word) for word in words], stdout=out, stderr=err, env=environment)
        # The peak is at least this script's own; fairseq-generate imports all that this does, and more.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status  # or Popen would wait for it again
        output, messages = (file.seek(0) or file.read().decode("utf-8") for file in (out, err))
    # the log is on either, as fairseq's version has it
    speed = re.search(r"([\d.]+) sentences/s", messages + output)
    if status != 0 or speed is None:
        sys.exit(f"{run}: {command} failed:\n{(output + messages)[-2000:]}")

    lines = (line[2:].split("\t", 2) for line in output.split("\n") if line.startswith("D-"))
    translations = {int(number): text for number, _, text in lines}
    with open(path, encoding="utf-8", newline="\n") as file:
        references = [line.rstrip("\n") for line in file]
    if len(translations) != len(references):
        sys.exit(f"{run}: {len(translations)} translations of {len(references)} sentences")
    bleu = corpus_bleu([translations[i] for i in sorted(translations)], [references])
    return {
        "sentences": len(translations),
        "speed": float(speed.group(1)),
        "memory": usage.ru_maxrss / 1024,
        "bleu": bleu.score,
    }


def table(medians: Dict[Key, Dict[str, float]], threads: int, beam: int) -> str:
    """Markdown: a row for each run, with BLEU, and speed, its ratio to the first run's and memory by batch
    size."""
    keys = [key for key in medians if key[:2] == (threads, beam)]
    batch_sizes, runs = (list(dict.fromkeys(key[i] for key in keys)) for i in (2, 3))
    header = ["model", "BLEU"]
    for batch_size in batch_sizes:
        header += [f"sentences/s, batch {batch_size}", f"÷ {runs[0]}", "memory MiB"]
    rows = [header, ["---"] * len(header)]
    for run in runs:
        row = [run, f"{medians[threads, beam, max(batch_sizes), run]['bleu']:.1f}"]
        for batch_size in batch_sizes:
            first, result = (medians[threads, beam, batch_size, name] for name in (runs[0], run))
            ratio = result["speed"] / first["speed"]
            row += [f"{result['speed']:.1f}", f"{ratio:.2f}", f"{result['memory']:.0f}"]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(medians: Dict[Key, Dict[str, float]], path: Path) -> None:
    """Draw BLEU against speed with the first number of threads, a panel for each beam and batch size."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes every logger tell all
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads, beams, batch_sizes, runs = (list(dict.fromkeys(values)) for values in zip(*medians))
    size = (4.5 * len(batch_sizes), 3.2 * len(beams))
    figure, axes = pyplot.subplots(
        len(beams), len(batch_sizes), figsize=size, squeeze=False, layout="constrained"
    )
    for row, beam in zip(axes, beams):
        for panel, batch_size in zip(row, batch_sizes):
            for run in runs:
                speed = medians[threads[0], beam, batch_size, run]["speed"]
                bleu = medians[threads[0], beam, max(batch_sizes), run]["bleu"]
                panel.scatter(speed, bleu, label=run)
            panel.set(title=f"beam {beam}, batch {batch_size}", xlabel="sentences/s", ylabel="BLEU")
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(pyplot.NullLocator())
            panel.margins(0.1)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, translate with the runs in turn, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, metavar="WORK", help="folder that a translation recipe wrote")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run in WORK, or RUN:TASK")
    parser.add_argument("--beam", type=positive, nargs="+", default=[5, 1])
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 128])
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each run; tables show medians")
    parser.add_argument("--json", type=output, help="file for every measurement")
    parser.add_argument("--plot", type=picture, help="file for a picture of BLEU against speed")
    args = parser.parse_args()
    if importlib.util.find_spec(PEER) is None:
        left = [run for run in args.runs if run.partition(":")[2].startswith(PEER)]
        if left:
            print(f"{', '.join(left)} left out: pip install ctranslate2 pyyaml", file=sys.stderr)
        args.runs = [run for run in args.runs if run not in left]
    for run in args.runs:
        find(args.work, run)

    grid = [(t, k, b) for t in args.threads for k in args.beam for b in args.batch_size]
    measured: Dict[Key, List[Dict[str, float]]] = {(*point, run): [] for point in grid for run in args.runs}
    for i in range(args.rounds):
        first = i % len(args.runs)
        for threads, beam, batch_size in grid:
            for run in args.runs[first:] + args.runs[:first]:
                settings = f"threads {threads}, beam {beam}, batch {batch_size}"
                print(f"round {i + 1} of {args.rounds}: {settings}: {run}", file=sys.stderr, flush=True)
                result = measure(args.work, threads, beam, batch_size, run)
                measured[threads, beam, batch_size, run].append(result)
    medians = {
        key: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for key, rounds in measured.items()
    }
    environment = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "rounds": args.rounds,
    }
    print(json.dumps(environment))
    for threads in args.threads:
        for beam in args.beam:
            print(f"\nthreads {threads}, beam {beam}\n\n{table(medians, threads, beam)}")
    if args.json:
        names = ("threads", "beam", "batch_size", "run")
        every = [{**dict(zip(names, key)), "rounds": rounds} for key, rounds in measured.items()]
        args.json.write_text(json.dumps({"environment": environment, "measured": every}, indent=1))
    if args.plot:
        plot(medians, args.plot)


if __name__ == "__main__":
    main()
