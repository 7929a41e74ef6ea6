"""All that this package changes in fairseq, PyTorch and NumPy.

Importing this file changes nothing. ``fairseq_lrn.models`` and ``fairseq_lrn.tasks`` call :func:`apply`. It
applies each of :data:`PATCHES` whose fault is present. A replaced function stays as ``__wrapped__``.
tests/test_fairseq_patches.py shows each fault upstream, and fails once one is gone.
"""

import argparse
import codecs
import functools
import inspect
import logging
import math
import os
import pickle
import re
import time
import types
from contextlib import contextmanager
from typing import Any, BinaryIO, Callable, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, FairseqDataset, data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.optim import fp16_optimizer
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=None)  # once
def apply() -> None:
    """Fix the faults of :data:`PATCHES` that are present."""
    for fault, mend in PATCHES:
        if fault():
            mend()


def replace(owner: Any, name: str, new: Callable) -> None:
    """Put ``new`` in place of the function ``owner.name``, which stays as its ``__wrapped__``."""
    new = functools.wraps(getattr(owner, name))(new)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(new) if static else new)


# ---------------------------------------------------------------------------------------------- sentences


def drops_sentences() -> bool:
    """Whether fairseq drops the third of three sentences when batches must hold two."""
    ones = np.ones(3, dtype=np.int64)
    batches = data_utils.batch_by_size(
        np.arange(3), None, ones, max_sentences=2, required_batch_size_multiple=2
    )
    return sum(map(len, batches)) < 3


def keep_sentences() -> None:
    """Batches hold every sentence.

    Why: fairseq drops the last batch that --required-batch-size-multiple, 8 by default, does not divide, from
    training, validation and translation: https://github.com/facebookresearch/fairseq/issues/5036.
    Until: fairseq keeps that batch.
    """
    original = data_utils.batch_by_size

    def batch_by_size(
        indices: Iterable[int],
        num_tokens_fn: Callable,
        num_tokens_vec: Any = None,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        required_batch_size_multiple: int = 1,
        fixed_shapes: Any = None,
    ) -> List[Any]:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        if len(indices) == 0:
            return []
        batches = original(
            indices,
            num_tokens_fn,
            num_tokens_vec,
            max_tokens,
            max_sentences,
            required_batch_size_multiple,
            fixed_shapes,
        )
        rest = indices[sum(map(len, batches)) :]  # batches have the order of indices
        return [*batches, rest] if len(rest) else batches

    replace(data_utils, "batch_by_size", batch_by_size)


# -------------------------------------------------------------------------------------------- checkpoints


def refuses_own_checkpoints() -> bool:
    """Whether torch.load refuses what fairseq saves."""
    return argparse.Namespace not in torch.serialization.get_safe_globals()


def allow_own_checkpoints() -> None:
    """torch.load reads fairseq's checkpoints with weights_only=True, and still runs no code.

    Why: they hold an argparse.Namespace, NumPy's arrays of counts (--eval-bleu), its numbers of any dtype
    (--best-checkpoint-metric) and a Dictionary (tasks of speech). PyTorch 2.6 refuses them:
    https://github.com/facebookresearch/fairseq/issues/5610.
    Until: fairseq saves nothing but tensors and Python's own types.
    """
    rebuild = [np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]]  # an array, and a number
    # No objects: they could be of any class.
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    torch.serialization.add_safe_globals(
        [argparse.Namespace, Dictionary, codecs.encode, np.ndarray, np.dtype, *dtypes, *rebuild]
    )
    if torch.__version__ >= "2.6":  # which can be told that NumPy 1 and 2 have two names for one function
        torch.serialization.add_safe_globals(
            [
                (function, f"numpy.{core}.multiarray.{function.__name__}")
                for function in rebuild
                for core in ("core", "_core")
            ]
        )


def loads_without_a_name() -> bool:
    """Whether fairseq does not say which checkpoint is damaged."""
    try:
        checkpoint_utils.load_checkpoint_to_cpu(os.devnull)
    except Exception as error:
        return os.devnull not in str(error)
    return False


def name_bad_checkpoints() -> None:
    """A file that is not a fairseq checkpoint is refused, in one sentence that names it, and runs no code.

    Why: PyTorch's message has no name, and fairseq may ask PyTorch to run code: before 2.6 by default, since
    https://github.com/facebookresearch/fairseq/pull/5611 everywhere.
    Until: fairseq loads with weights_only=True and names the file.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict:
        try:
            with weights_only():
                return original(path, *args, **kwargs)
        except Exception as error:
            problem = find_problem(PathManager.get_local_path(path))
            if problem is None:
                raise
            raise ValueError(f"{path} {problem}") from error

    replace(checkpoint_utils, "load_checkpoint_to_cpu", load_checkpoint_to_cpu)


@contextmanager
def weights_only() -> Iterator[None]:
    """Make torch.load run no code, whatever its arguments, unless the user asked for that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if name in os.environ or "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def find_problem(path: str) -> Optional[str]:
    """Say why ``path`` is not a fairseq checkpoint; None if it is one, or if there is no file."""
    if not os.path.isfile(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)|but got <class '(.+?)'>|unrecognized function (.+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            name = next(filter(None, foreign.groups()))
            return f"is refused, because it holds {name}, which is neither data nor fairseq's"
        return f"is damaged or not a checkpoint: PyTorch cannot read its {os.path.getsize(path)} bytes"
    keys = state if isinstance(state, dict) else {}
    missing = {"model", "optimizer_history", "extra_state"}.difference(keys)
    if missing:
        return f"is not a checkpoint of fairseq's: it lacks {', '.join(sorted(missing))}"
    return None


def sends_what_cannot_be_read() -> bool:
    """Whether fairseq sends a checkpoint's configuration between processes in a form that PyTorch refuses."""
    source = inspect.getsource(distributed_utils._broadcast_object_slow)
    return torch.__version__ >= "2.6" and "torch.load(" in source and "weights_only" not in source


def send_any_object() -> None:
    """Several processes resume from a checkpoint.

    Why: the first sends the others its configuration, an OmegaConf object, by torch.save and torch.load.
    PyTorch 2.6 refuses it: https://github.com/facebookresearch/fairseq/issues/5610.
    Until: fairseq passes weights_only=False there, which is safe: the data are fairseq's.
    """

    def _broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        objects = [obj]
        torch.distributed.broadcast_object_list(objects, src=src_rank, group=group, device=dist_device)
        return objects[0]

    replace(distributed_utils, "_broadcast_object_slow", _broadcast_object_slow)


def appends_to_failed_saves() -> bool:
    """Whether fairseq, after a failed attempt to save, appends to what it wrote."""
    return "seek" not in inspect.getsource(checkpoint_utils._torch_persistent_save)


def save_from_the_beginning() -> None:
    """A checkpoint that is saved at the second attempt is whole.

    Why: after torch.save has failed, fairseq calls it again on the same file. Two in one file cannot be read:
    https://github.com/pytorch/pytorch/issues/61923.
    Until: fairseq writes the file from the beginning.
    """

    def _torch_persistent_save(obj: Any, file: BinaryIO) -> None:
        for attempt in (1, 2, 3):
            try:
                file.seek(0)
                file.truncate()
                return torch.save(obj, file)
            except Exception:
                if attempt == 3:
                    raise
                time.sleep(2.5)

    replace(checkpoint_utils, "_torch_persistent_save", _torch_persistent_save)


def copies_in_place() -> bool:
    """Whether fairseq copies a new checkpoint over the old one, instead of replacing it when it is whole."""
    return "rename" not in inspect.getsource(PathManager.copy)


def replace_whole() -> None:
    """A training that is killed leaves ``checkpoint_best.pt`` and ``checkpoint_last.pt`` whole.

    Why: fairseq copies over them in place. After a signal or on a full disk only part of a file is left, and
    nothing resumes from it: https://github.com/facebookresearch/fairseq/issues/2684.
    Until: fairseq copies to another name and renames.
    """
    original = PathManager.copy

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not PathManager.supports_rename(dst_path):
            return original(src_path, dst_path, overwrite)
        copied = original(src_path, dst_path + ".tmp", overwrite=True)
        PathManager.rename(dst_path + ".tmp", dst_path)
        return copied

    replace(PathManager, "copy", copy)


# ------------------------------------------------------------------------------------------------- labels


def reads_any_label() -> bool:
    """Whether fairseq's task sentence_prediction loads labels without checking for unknown ones."""
    return "unk" not in inspect.getsource(SentencePredictionTask.load_dataset)


def check_labels() -> None:
    """fairseq's task sentence_prediction names a wrong label, with its file and line, before it trains.

    Why: it fails in the middle of training with "Target -1 is out of bounds", which names neither.
    Until: fairseq checks labels when it loads them.
    """
    original = SentencePredictionTask.load_dataset

    @functools.wraps(original)
    def load_dataset(
        self: SentencePredictionTask, split: str, combine: bool = False, **kwargs: Any
    ) -> FairseqDataset:
        """As fairseq's, but check the labels of the split; it may have none.

        Raises:
            ValueError: a token to add is not in the dictionary; the numbers of labels and inputs differ; a
                line has no label or several; a label is unknown, beyond ``--num-classes`` or, for regression,
                not finite
        """
        cfg, words = self.cfg, self.source_dictionary
        for name in ("init_token", "separator_token"):
            token = getattr(cfg, name)
            if token is not None and not 0 <= token < len(words):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {token}, but must be an index in the dictionary, below "
                    f"{len(words)}"
                )
        lines = {}
        for name in ("input0", "input1"):
            path = os.path.join(cfg.data, name, split)
            dataset = data_utils.load_indexed_dataset(path, words, combine=combine)
            if dataset is not None:
                lines[path] = len(dataset)
        path = os.path.join(cfg.data, "label", split)
        if cfg.regression_target:
            path += ".label"
            if os.path.exists(path):
                lines[path] = check_numbers(path, cfg.num_classes)
        else:
            labels = data_utils.load_indexed_dataset(path, self.label_dictionary, combine=combine)
            if labels is not None:
                lines[path] = len(labels)
                check_classes(labels, path, self)
        if len(set(lines.values())) > 1:
            counts = ", ".join(f"{path} has {count} lines" for path, count in lines.items())
            raise ValueError(f"there must be one label for each input, but {counts}")
        return original(self, split, combine, **kwargs)

    SentencePredictionTask.load_dataset = load_dataset


def check_classes(labels: Any, path: str, task: SentencePredictionTask) -> None:
    """Raise ValueError unless each line of ``path``, which ``labels`` holds, has one known label."""
    words, classes = task.label_dictionary, task.cfg.num_classes
    # <mask> is fairseq's, and fairseq-preprocess rounds the number of words up
    known = [
        word for word in words.symbols[words.nspecial :] if not word.startswith(("<mask>", "madeupword"))
    ]
    if len(known) < classes:
        logger.warning("--num-classes is %d, but there are only the labels %s", classes, ", ".join(known))
    if labels.supports_prefetch:
        labels.prefetch(range(len(labels)))
    for number in range(1, len(labels) + 1):
        ids = [i for i in labels[number - 1].tolist() if i != words.eos()]
        if len(ids) != 1:
            raise ValueError(f"{path}, line {number}, has {len(ids)} labels, but must have 1")
        label = ids[0] - words.nspecial
        if label < 0:
            raise ValueError(
                f"{path}, line {number}, has a label that is not in the dictionary of labels: the training "
                f"set has {', '.join(known)}"
            )
        if label >= classes:
            raise ValueError(
                f"{path}, line {number}, has the label {words[ids[0]]}, number {label + 1} in the dictionary "
                f"of labels, but --num-classes is {classes}"
            )


def check_numbers(path: str, targets: int) -> int:
    """Count the lines of ``path``; raise ValueError unless each has ``targets`` finite numbers."""
    number = 0
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                right = [math.isfinite(float(word)) for word in line.split()]
            except ValueError:
                right = [False]
            if right != [True] * targets:
                raise ValueError(
                    f"{path}, line {number}, is {line.strip()!r}, but must be {targets} finite "
                    "numbers, as --num-classes says"
                )
    return number


# ----------------------------------------------------------------------------------------------- optimizer


def copies_each_parameter() -> bool:
    """Whether fairseq's optimizer for float16 copies each parameter and gradient by itself."""
    return hasattr(torch, "_foreach_copy_") and "foreach" not in inspect.getsource(fp16_optimizer)


def copy_all_parameters() -> None:
    """A GPU that trains in float16 does not wait for hundreds of small copies in each update.

    Why: fairseq cuts the flat float32 parameters up in Python, and launches a kernel for each, twice.
    Until: fairseq copies them together.
    """
    mixin = fp16_optimizer._FP16OptimizerMixin
    copy_gradients, copy_parameters = mixin._sync_fp16_grads_to_fp32, mixin._sync_fp32_params_to_fp16

    def parts(flat: Tensor, device: Any, parameters: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        found = [parameter for parameter in parameters if parameter.device.index == device]
        return found, list(torch._utils._unflatten_dense_tensors(flat, found))

    @torch.no_grad()
    def _sync_fp16_grads_to_fp32(self: Any) -> None:
        if not (self._needs_sync and isinstance(self.fp32_params, dict)):
            return copy_gradients(self)
        for device, flat in self.fp32_params.items():
            found, copies = parts(flat.grad, device, [x for x in self.fp16_params if x.requires_grad])
            if found:
                grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in found]
                torch._foreach_copy_(copies, grads)
        self._needs_sync = False

    @torch.no_grad()
    def _sync_fp32_params_to_fp16(self: Any) -> None:
        if not isinstance(self.fp32_params, dict):
            return copy_parameters(self)
        for device, flat in self.fp32_params.items():
            found, copies = parts(flat, device, self.fp16_params)
            if found:
                torch._foreach_copy_([x.data for x in found], copies)  # no new version, as in fairseq

    replace(mixin, "_sync_fp16_grads_to_fp32", _sync_fp16_grads_to_fp32)
    replace(mixin, "_sync_fp32_params_to_fp16", _sync_fp32_params_to_fp16)


# -------------------------------------------------------------------------------------------------- NumPy


def lacks_numpy_compat() -> bool:
    """Whether NumPy has no ``np.compat``, as from 2.0 on."""
    return not hasattr(np, "compat")


def give_numpy_compat() -> None:
    """fairseq's language models read their data with NumPy 2.

    Why: TokenBlockDataset and LanguagePairDataset read ``np.compat.long``, which NumPy 2.0 removed:
    https://github.com/numpy/numpy/pull/28961.
    Until: fairseq writes ``int``.
    """
    setattr(np, "compat", types.SimpleNamespace(long=int))  # noqa: B010  NumPy's types know no such name


PATCHES: Tuple[Tuple[Callable[[], bool], Callable[[], None]], ...] = (
    (drops_sentences, keep_sentences),
    (refuses_own_checkpoints, allow_own_checkpoints),
    (loads_without_a_name, name_bad_checkpoints),
    (sends_what_cannot_be_read, send_any_object),
    (appends_to_failed_saves, save_from_the_beginning),
    (copies_in_place, replace_whole),
    (reads_any_label, check_labels),
    (copies_each_parameter, copy_all_parameters),
    (lacks_numpy_compat, give_numpy_compat),
)
