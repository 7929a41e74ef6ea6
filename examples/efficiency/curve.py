"""BLEU of a training's epochs against its time, from checkpoints: see README.md.

    python curve.py WORK SOURCE TARGET RUN=SPEED [RUN=SPEED ...] [--json FILE] [--plot FILE.png]

Each epoch's checkpoint in WORK/runs/RUN translates the test set, with beam 5. SPEED is the words a second
that the model trains. The time is the number of words, from the training's log, divided by it: so it does
not matter what else a machine did meanwhile.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

from arguments import output, picture

import fairseq_lrn

NUMBER = r"([\d.e+]+)"
EPOCH = re.compile(rf"\[train\].* epoch (\d+) .*\| wpb {NUMBER} .*\| num_updates {NUMBER}")


def words(log: Path) -> Dict[int, float]:
    """Return how many target words a training had seen after each epoch of its log."""
    updates, seen, found = 0.0, 0.0, {}
    for epoch, per_update, after in EPOCH.findall(log.read_text(encoding="utf-8")):
        if int(epoch) == 1:  # a training that began anew may be in the same log
            updates, seen, found = 0.0, 0.0, {}
        if float(after) > updates:  # an epoch that was trained again is there twice
            seen += float(per_update) * (float(after) - updates)
            updates, found[int(epoch)] = float(after), seen
    if not found:
        sys.exit(f"{log} has no whole epoch, or another log_format than simple")
    return found


def speed(text: str) -> Tuple[str, float]:
    """Read RUN=SPEED."""
    found = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)", text)
    if found is None or float(found[2]) == 0:
        raise argparse.ArgumentTypeError(f"must be RUN=SPEED with a positive number, but is {text}")
    return found[1], float(found[2])


def bleu(work: Path, source: str, target: str, checkpoint: Path) -> float:
    """Translate the test set with a checkpoint and return sacreBLEU's score."""
    from sacrebleu import corpus_bleu

    command = [sys.executable, "-m", "fairseq_cli.generate", "bin", "--user-dir", fairseq_lrn.__path__[0]]
    command += ["--task", "lrn_translation", "-s", source, "-t", target, "--path", str(checkpoint)]
    command += "--beam 5 --remove-bpe sentencepiece --batch-size 128 --required-batch-size-multiple 1".split()
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"fairseq-generate failed with {checkpoint}:\n{done.stderr[-2000:]}")
    lines = [line[2:].split("\t") for line in done.stdout.split("\n") if line.startswith("D-")]
    found = {int(number): text for number, _, text in lines}
    reference = (work / "text" / f"test.{target}").read_text(encoding="utf-8").split("\n")[:-1]
    return corpus_bleu([found[i] for i in range(len(reference))], [reference]).score


def plot(curves: Dict[str, List[Dict[str, float]]], path: Path) -> None:
    """Draw BLEU against minutes."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq makes every logger tell all
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run, points in curves.items():
        axes.plot([x["minutes"] for x in points], [x["bleu"] for x in points], ".-", label=run)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("BLEU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, translate, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="a recipe's folder of work")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument(
        "runs", nargs="+", type=speed, metavar="RUN=SPEED", help="runs, and their training words a second"
    )
    parser.add_argument("--json", type=output, help="file for every point")
    parser.add_argument("--plot", type=picture, help="file for a picture")
    args = parser.parse_args()
    args.work = args.work.resolve()

    curves: Dict[str, List[Dict[str, float]]] = {}
    print("| run | epoch | minutes | BLEU |\n|---|---|---|---|", flush=True)
    for run, rate in args.runs:
        folder, curves[run] = args.work / "runs" / run, []
        for epoch, seen in words(folder / "train.log").items():
            checkpoint = folder / f"checkpoint{epoch}.pt"
            if checkpoint.exists():
                score = bleu(args.work, args.source, args.target, checkpoint)
                point = {"epoch": epoch, "minutes": seen / rate / 60, "bleu": score}
                curves[run].append(point)
                print(f"| {run} | {epoch} | {point['minutes']:.1f} | {score:.1f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1))
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
