"""Average the parameters of a run's last N epoch checkpoints: python average.py RUN N OUTPUT."""

import os
import re
import sys
from pathlib import Path

import torch

from fairseq_lrn import fairseq_patches

fairseq_patches.apply()  # lets torch.load read fairseq's checkpoints with weights_only=True


def average(run: Path, count: int, output: Path) -> None:
    """Write ``run``'s latest epoch checkpoint to ``output``, its parameters averaged over the last ``count``.

    Tensors that are not floating point stay the latest checkpoint's.
    Raises ``ValueError`` if ``run`` holds fewer than ``count`` epoch checkpoints.
    """
    names = [re.fullmatch(r"checkpoint(\d+)\.pt", path.name) for path in run.iterdir()]
    epochs = sorted(int(name[1]) for name in names if name)
    if not 1 <= count <= len(epochs):
        raise ValueError(f"count is {count}, and {run} holds {len(epochs)} epoch checkpoints")
    states = [
        torch.load(run / f"checkpoint{epoch}.pt", map_location="cpu", weights_only=True, mmap=True)
        for epoch in epochs[-count:]
    ]
    latest = states[-1]
    for name, tensor in latest["model"].items():
        if tensor.is_floating_point():
            mean = torch.stack([state["model"][name].double() for state in states]).mean(0)
            latest["model"][name] = mean.to(tensor.dtype)
    # an interrupted write must not look like a result
    torch.save(latest, f"{output}.part")
    os.replace(f"{output}.part", output)


if __name__ == "__main__":
    average(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
