"""``python -m fairseq_lrn`` prints the folder to pass as ``--user-dir``; ``--check`` tries the operators."""

import argparse
import sys
from pathlib import Path

from . import __version__


def check() -> bool:
    """Print the compiled operators, and whether the recurrence agrees with its definition on each device."""
    import torch

    from . import ops
    from .ops._library import loaded

    print(f"fairseq_lrn {__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    if loaded:
        names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
        ours = sorted(name for library, name in names if library == "fairseq_lrn")
        print(f"compiled operators: {', '.join(ours)}")
        print(f"instruction set: {torch.ops.fairseq_lrn.cpu_capability()}")
    else:
        print("compiled operators: none, the definition in PyTorch is used")

    agrees = True
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=generator) for shape in ((9, 3, 160), (3, 40), (9, 3, 40))]
        mask = torch.arange(9) >= torch.tensor([[9], [6], [2]])
        results = []
        for scan, dtype in ((ops.lrn_scan, torch.float32), (ops.lrn_scan_reference, torch.float64)):
            projections, state, weights = (x.to(device, dtype) for x in given)
            leaves = projections.requires_grad_(), state.requires_grad_()
            output = scan(*leaves, mask.to(device), output_gate=True)
            results.append([output, *torch.autograd.grad((output * weights).sum(), leaves)])
        differences = [(one - other).abs().max().item() for one, other in zip(*results)]
        for title, difference in (("forward", differences[0]), ("backward", max(differences[1:]))):
            print(f"{title} pass on {device}: differs from the definition by at most {difference:.1e}")
        agrees &= max(differences) < 1e-5
    print("all agree" if agrees else "THEY DO NOT AGREE")
    return agrees


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_lrn", description="Print the folder to pass as --user-dir."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="list the compiled operators and check their results",
    )
    parser.add_argument("--version", action="version", version=__version__)
    if not parser.parse_args().check:
        print(Path(__file__).resolve().parent)
    elif not check():
        sys.exit(1)
