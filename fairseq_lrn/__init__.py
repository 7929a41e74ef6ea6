"""Lightweight Recurrent Network (Zhang and Sennrich, ACL 2019) as a fairseq plugin."""

import argparse
import codecs
import types

import numpy as np
import torch

# fairseq's checkpoints hold an argparse.Namespace and, with --eval-bleu, arrays of counts; allowing them
# keeps weights_only=True's protection.
_counts = np.zeros(1, dtype=np.int64)
_rebuild = _counts.__reduce__()[0]
torch.serialization.add_safe_globals(
    [argparse.Namespace, codecs.encode, np.ndarray, np.dtype, type(_counts.dtype), _rebuild]
)
if torch.__version__ >= "2.6":  # which can be told that NumPy 1 and 2 have two names for one function
    torch.serialization.add_safe_globals(
        [(_rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    )

if not hasattr(np, "compat"):  # fairseq's TokenBlockDataset reads it, and NumPy 2 has it no more
    np.compat = types.SimpleNamespace(long=int)
