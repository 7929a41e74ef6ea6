"""Each fault of fairseq_patches.PATCHES as fairseq has it, and mended.

A test that fails because upstream does well asks for its patch to be removed.
"""

import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import fairseq
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import TokenBlockDataset, data_utils
from fairseq.file_io import PathManager
from fairseq.optim import fp16_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import fairseq_lrn.models  # noqa: F401  applies the patches
from fairseq_lrn import fairseq_patches

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]


def test_every_fault_has_a_test_here():
    tested = {name[len("test_") :] for name in globals()}
    tested.add("check_labels")  # by tasks/test_sentence_prediction.py
    assert {mend.__name__ for _, mend in fairseq_patches.PATCHES} <= tested


def test_importing_changes_nothing():
    program = """
import sys, fairseq_lrn
assert not {"torch", "numpy", "fairseq"} & set(sys.modules)
import numpy as np, torch
before = hasattr(np, "compat"), torch.serialization.get_safe_globals()
import fairseq.checkpoint_utils, fairseq_lrn.modules, fairseq_lrn.fairseq_patches
assert (hasattr(np, "compat"), torch.serialization.get_safe_globals()) == before
assert not hasattr(fairseq.checkpoint_utils.load_checkpoint_to_cpu, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("sentences", range(10))
@pytest.mark.parametrize("limit", [{"max_sentences": 5}, {"max_tokens": 12}, {}], ids=str)
def test_keep_sentences(sentences, limit):
    sizes = np.arange(sentences) % 4 + 1
    indices = np.arange(sentences)[::-1]

    def batches(function, sizes_vec, indices):
        return function(indices, sizes.__getitem__, sizes_vec, required_batch_size_multiple=4, **limit)

    for sizes_vec, given in ((sizes, indices), (None, indices), (None, iter(indices.tolist()))):
        found = batches(data_utils.batch_by_size, sizes_vec, given)
        assert [i for batch in found for i in batch] == indices.tolist()
        for batch in found[:-1]:
            assert len(batch) % 4 == 0 or len(batch) < 4
            assert len(batch) <= limit.get("max_sentences", 10)
            assert len(batch) * max(sizes[i] for i in batch) <= limit.get("max_tokens", 100)
    if sentences and fairseq.__version__ != "0.12.2":  # an older one than fairseq-fixed
        upstream = batches(data_utils.batch_by_size.__wrapped__, sizes, indices)
        assert sum(map(len, upstream)) == sentences - (len(found[-1]) if len(found[-1]) % 4 else 0)


def test_every_sentence_is_trained_on_and_translated(run, data, test_sentences, tmp_path):
    """8, fairseq's default --required-batch-size-multiple, divides none of these sets."""
    train = (
        "--arch lrn_tiny --encoder-layers 1 --decoder-layers 1 --optimizer adam --cpu --num-workers 0 "
        "--max-tokens 100000 --max-epoch 1 --log-format json"
    ).split()
    out = run("fairseq-train", data, *PLUGIN, *train, "--save-dir", tmp_path)
    for part, sentences in (("train", 150), ("valid", 21)):
        size, batches = re.search(rf'"{part}_bsz": "([\d.]+)".*"{part}_num_updates": "(\d+)"', out).groups()
        assert float(size) * int(batches) == sentences
    path = ["--path", tmp_path / "checkpoint_last.pt", "--cpu", "--num-workers", 0]
    for command in (["fairseq-generate"], ["fairseq-generate", "--task", "lrn_translation"]):
        out = run(*command, data, *PLUGIN, *path, "--beam", 1, "--max-len-b", 5)
        assert sum(line.startswith("H-") for line in out.splitlines()) == len(test_sentences)


SCALARS = [np.array(1).astype(code)[()] for code in np.typecodes["All"] if code not in "OMm"]
SCALARS += [np.datetime64("2019-06-03T10:15"), np.timedelta64(3, "s"), np.float64("nan")]
EVERYTHING = {
    "numbers": SCALARS,
    "counts": np.arange(4),
    "names": np.array(["a", "bc"]),
}


def test_allow_own_checkpoints():
    file = io.BytesIO()
    torch.save(EVERYTHING, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    for one, other in zip(found["numbers"], pickle.loads(pickle.dumps(SCALARS))):
        assert (type(one), one.dtype, one.tobytes()) == (type(other), other.dtype, other.tobytes())
    assert found["counts"].tolist() == [0, 1, 2, 3] and found["names"].tolist() == ["a", "bc"]

    program = """
import argparse, io, torch
for value in (argparse.Namespace(arch="transformer"), __import__("numpy").float64(1)):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception:
        continue
    raise SystemExit("PyTorch allows it")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_objects_stay_refused():
    for foreign in (np.array([Path()], dtype=object), Path(), np.array([np.dtype(object)], dtype=object)):
        file = io.BytesIO()
        torch.save({"extra_state": foreign}, file)
        file.seek(0)
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(file, weights_only=True)


def test_name_bad_checkpoints(tmp_path):
    """What is refused for which reason is in models/test_checkpoints.py."""
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty\.pt is damaged"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "empty.pt"))
    with pytest.raises(Exception) as caught:
        checkpoint_utils.load_checkpoint_to_cpu.__wrapped__(str(tmp_path / "empty.pt"))
    assert "empty.pt" not in str(caught.value)


def test_no_caller_of_load_checkpoint_runs_code(tmp_path, monkeypatch):
    """Not fairseq's next version either, which passes weights_only=False."""
    torch.save({"model": Path()}, tmp_path / "path.pt")
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    with fairseq_patches.weights_only(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "path.pt", weights_only=False)
    assert torch.load(tmp_path / "path.pt", weights_only=False) == {"model": Path()}


BROADCAST = """
import sys, torch
from omegaconf import OmegaConf
from fairseq.distributed import utils
from fairseq_lrn import fairseq_patches

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
world, sent = torch.distributed.group.WORLD, {"cfg": OmegaConf.create({"a": [1]}), "model": torch.ones(2)}
mine, cpu = (sent if rank == 0 else None), torch.device("cpu")
try:
    utils._broadcast_object_slow(mine, 0, world, cpu)
    print("received" if rank else "")
except Exception as error:
    assert "Weights only load failed" in str(error), error
fairseq_patches.apply()
got = utils.broadcast_object(mine, 0, world, cpu)
assert got["cfg"] == sent["cfg"] and torch.equal(got["model"], sent["model"])
"""


@pytest.mark.skipif(torch.__version__ < "2.6", reason="PyTorch loads anything")
def test_send_any_object(start, tmp_path):
    (tmp_path / "broadcast.py").write_text(BROADCAST)
    processes = [start(tmp_path / "broadcast.py", rank, f"file://{tmp_path}/meet") for rank in (0, 1)]
    for process in processes:
        process.join()
        output = process.output.read_text(encoding="utf-8")
        assert process.exitcode == 0, output
        assert "received" not in output


class FailsOnce(io.BytesIO):
    """A file on a disk that is full for a moment."""

    failed = False

    def write(self, content):
        if not self.failed and self.tell() > 1000:
            self.failed = True
            raise OSError("no space left on device")
        return super().write(content)


def test_save_from_the_beginning(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    for save, readable in (
        (checkpoint_utils._torch_persistent_save, True),
        (checkpoint_utils._torch_persistent_save.__wrapped__, False),
    ):
        file = FailsOnce()
        save({"x": torch.ones(1000)}, file)
        assert file.failed
        file.seek(0)
        try:
            assert torch.equal(torch.load(file, weights_only=True)["x"], torch.ones(1000)) and readable
        except Exception:
            assert not readable


def test_replace_whole(tmp_path):
    """Who has the old file open goes on reading the old one."""
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new")
    for copy, whole in ((PathManager.copy, True), (PathManager.copy.__wrapped__, False)):
        old.write_text("old")
        with old.open() as reader:
            copy(str(new), str(old), overwrite=True)
            assert (reader.read() == "old") == whole
        assert old.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


class Copies(TorchDispatchMode):
    """Counts copies, each of which is a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "copy_" in function.__name__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("missing", [False, True])
def test_copy_all_parameters(missing):
    """The same copies; the optimizer's flat parameters are those that fairseq makes on a GPU."""
    mixin = fp16_optimizer._FP16OptimizerMixin
    shapes = [(3, 4), (5,), (), (0,), (2, 3, 2)] * 20

    def optimizer():
        generator = torch.Generator().manual_seed(0)
        made = mixin()
        made.fp16_params = [torch.nn.Parameter(torch.randn(x, generator=generator).half()) for x in shapes]
        flat = torch.nn.Parameter(torch.randn(sum(p.numel() for p in made.fp16_params), generator=generator))
        flat.grad = torch.full_like(flat, torch.nan)
        made.fp32_params, made._needs_sync = {None: flat}, True
        for i, p in enumerate(made.fp16_params):
            if not missing or i % 3:
                p.grad = torch.randn(p.shape, generator=generator).half()
        return made

    found, counts = [], []
    for function in (lambda x: x, lambda x: x.__wrapped__):
        made = optimizer()
        with Copies() as copies:
            function(mixin._sync_fp16_grads_to_fp32)(made)
            function(mixin._sync_fp32_params_to_fp16)(made)
        assert not made._needs_sync
        found.append([made.fp32_params[None].grad, *made.fp16_params])
        assert [p._version for p in made.fp16_params] == [0] * len(shapes)
        counts.append(copies.count)
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)
    assert not found[0][0].isnan().any()
    assert counts == [2, 2 * len(shapes)]


def test_give_numpy_compat(monkeypatch):
    def blocks():
        return len(TokenBlockDataset([torch.ones(3)] * 4, [3] * 4, None, pad=0, eos=1, break_mode="eos"))

    assert blocks() == 4
    monkeypatch.delattr(np, "compat", raising=False)
    with pytest.raises(AttributeError, match="compat"):
        blocks()


PROGRAM = """
import argparse
from fairseq_lrn.modules import LRN
from fairseq import options, utils
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
import fairseq_lrn

folders = fairseq_lrn.__path__
if {plain}:
    fairseq_lrn.__path__ = list(folders)
utils.import_user_module(argparse.Namespace(user_dir={folder!r}))
assert ("lrn_tiny" in ARCH_MODEL_REGISTRY, "lrn_translation" in TASK_REGISTRY) == (not {plain},) * 2
"""


@pytest.mark.parametrize("plain", [False, True], ids=["here", "upstream"])
def test_a_package_that_was_imported_before_is_registered(start, plain, tmp_path):
    """fairseq skips --user-dir then; fairseq_lrn/__init__.py mends it."""
    (tmp_path / "program.py").write_text(PROGRAM.format(plain=plain, folder=str(ROOT / "fairseq_lrn")))
    process = start(tmp_path / "program.py")
    process.join()
    assert process.exitcode == 0, process.output.read_text(encoding="utf-8")
