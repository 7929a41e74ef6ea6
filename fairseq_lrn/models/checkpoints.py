"""What fairseq needs to save and load checkpoints safely; importing it changes fairseq.

It then refuses what is no checkpoint of its own in one sentence, resumes in several processes, and keeps
checkpoints whole. fairseq itself appends to what a failed attempt at saving has written, and copies over
``checkpoint_best.pt`` and ``checkpoint_last.pt`` in place: a training ended meanwhile, by a signal or a full
disk, leaves a part of a file, from which nothing resumes.
"""

import os
import pickle
import re
import time
from typing import Any, BinaryIO, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

_load = checkpoint_utils.load_checkpoint_to_cpu
_copy = PathManager.copy


def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict:
    """Load a checkpoint as fairseq does, but say what is wrong with one that cannot be loaded.

    Raises:
        ValueError: the file is damaged, or holds what fairseq's checkpoints do not
        OSError: there is no such file
    """
    try:
        return _load(path, *args, **kwargs)
    except Exception as error:
        problem = _find_problem(PathManager.get_local_path(path))
        if problem is None:
            raise
        raise ValueError(f"{path} {problem}") from error


def _find_problem(path: str) -> Optional[str]:
    """Say why ``path`` is no checkpoint of fairseq's; None if it is one, or is no file."""
    if not os.path.isfile(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            return f"is refused, because it holds {forbidden[1]}, which fairseq's checkpoints do not"
        return f"is damaged or not a checkpoint: PyTorch cannot read its {os.path.getsize(path)} bytes"
    keys = state if isinstance(state, dict) else {}
    missing = {"model", "optimizer_history", "extra_state"}.difference(keys)
    if missing:
        return f"is not a checkpoint of fairseq's: it lacks {', '.join(sorted(missing))}"
    return None


def _broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    """Send ``obj`` between the processes of one run, as fairseq does, but with pickle.

    fairseq uses torch.load, which since PyTorch 2.6 refuses the configuration that a checkpoint holds.
    """
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src=src_rank, group=group, device=dist_device)
    return objects[0]


def save(obj: Any, file: BinaryIO) -> None:
    """Write ``obj`` to ``file``, in three attempts as fairseq does, but each from the file's beginning."""
    for attempt in (1, 2, 3):
        try:
            file.seek(0)
            file.truncate()
            return torch.save(obj, file)
        except Exception:
            if attempt == 3:
                raise
            time.sleep(2.5)


def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Copy a file as fairseq does, but to another name that is then changed to ``dst_path``."""
    if not PathManager.supports_rename(dst_path):
        return _copy(src_path, dst_path, overwrite)
    copied = _copy(src_path, dst_path + ".tmp", overwrite=True)
    PathManager.rename(dst_path + ".tmp", dst_path)
    return copied


if torch.__version__ < "2.6":  # where fairseq's calls of torch.load would run what a checkpoint's pickle says
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
checkpoint_utils._torch_persistent_save = save
distributed_utils._broadcast_object_slow = _broadcast_object
PathManager.copy = staticmethod(copy)
