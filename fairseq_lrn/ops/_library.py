"""Loads the compiled operators into ``torch.ops.fairseq_lrn``."""

import warnings
from pathlib import Path

import torch


def load_library() -> bool:
    """Whether the compiled operators could be loaded; warns and names the build command if not."""
    problem = "is not built"
    for library in sorted(Path(__file__).resolve().parent.parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
            return True
        except OSError as error:
            problem = f"does not load with PyTorch {torch.__version__} ({error})"
    warnings.warn(
        f"The compiled LRN operator {problem}; the much slower PyTorch definition is used instead. "
        "Build it in a checkout with `python setup.py build_ext --inplace`, or install with "
        "`pip install --no-build-isolation .`",
        stacklevel=2,
    )
    return False


loaded = load_library()
