"""Loads the compiled operators into ``torch.ops.fairseq_lrn``, and tells when they can be used."""

import warnings
from pathlib import Path

import torch
from torch.autograd import forward_ad


def load_library() -> bool:
    """Whether the compiled operators could be loaded; warns and names the build command if not.

    Raises:
        ImportError: another copy of them is loaded
        ValueError: FAIRSEQ_LRN_CPU_CAPABILITY names no instruction set of this machine
    """
    problem = "is not built"
    for library in sorted(Path(__file__).resolve().parent.parent.glob("_C*.so")):
        if hasattr(torch.ops.fairseq_lrn, "lrn_scan") and str(library) not in torch.ops.loaded_libraries:
            raise ImportError(
                f"{library} cannot be loaded, because another copy of it is: use one copy of fairseq_lrn in "
                "a process"
            )
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            problem = f"does not load with PyTorch {torch.__version__} ({error})"
        else:
            torch.ops.fairseq_lrn.cpu_capability()
            return True
    warnings.warn(
        f"The compiled LRN operator {problem}; the much slower PyTorch definition is used instead. "
        "Build it in a checkout with `python setup.py build_ext --inplace`, or install with "
        "`pip install --no-build-isolation .`",
        stacklevel=2,
    )
    return False


loaded = load_library()


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is active; they know only PyTorch's operators."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def eager() -> bool:
    """Whether nothing compiles, traces, transforms or records the operators that run."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )
