"""Run fairseq-train and print where the GPU's time goes in a step.

    python profile_training.py FIRST LAST [fairseq-train's arguments]

The updates after FIRST, up to LAST, are profiled. A line of JSON has their mean milliseconds of kernels and
number of kernels, and those of each kernel. A profiled step takes longer, but its kernels do not.
"""

import json
import sys
from typing import Any

import torch
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    """Read the command line and train."""
    first, last = int(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:3]
    profiler = profile(
        activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    )
    train_step = Trainer.train_step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        done = self.get_num_updates()
        if done == first:
            profiler.start()
        result = train_step(self, *args, **kwargs)
        if done < self.get_num_updates() == last:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            profiler.stop()
            report()
        return result

    def report() -> None:
        steps = last - first
        found = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        kernels = sorted(
            (
                (event.self_device_time_total / steps / 1000, event.count / steps, event.key)
                for event in found
            ),
            reverse=True,
        )
        whole = {"ms": sum(kernel[0] for kernel in kernels), "kernels": sum(kernel[1] for kernel in kernels)}
        print(json.dumps({"profile": whole, "by_kernel": kernels}), flush=True)

    Trainer.train_step = step
    cli_main()


if __name__ == "__main__":
    main()
