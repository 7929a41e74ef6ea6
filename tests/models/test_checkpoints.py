"""What fairseq's commands do with checkpoints, dictionaries and sentencepiece models, whole and broken."""

import os
import pickle
import resource
import shutil
import signal
import socket
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import SMALL_OPTIONS
from fairseq import checkpoint_utils

import fairseq_lrn.models  # noqa: F401  lets torch.load read fairseq's checkpoints with weights_only=True

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", ROOT / "fairseq_lrn"]
TRAIN = (
    "--optimizer adam --lr 0.005 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--max-tokens 400 --required-batch-size-multiple 1 --cpu --num-workers 0 --seed 3 "
    "--log-format simple --log-interval 1"
).split()
# with these a checkpoint holds more than weights: a second set of them, and NumPy's arrays
EXTRAS = (
    '--store-ema --ema-fp32 --eval-bleu --eval-bleu-args {"beam":1,"max_len_b":5} --eval-bleu-detok space '
    "--eval-bleu-remove-bpe sentencepiece --best-checkpoint-metric bleu --maximize-best-checkpoint-metric"
).split()


def train(data, arch, folder, updates, *options):
    return ["fairseq-train", data, *PLUGIN, "--arch", arch, *TRAIN, *SMALL_OPTIONS, "--share-all-embeddings",
            "--max-update", updates, "--save-dir", folder, *options]  # fmt: skip


def generate(data, checkpoint):
    fixed = (
        "-s en -t de --cpu --beam 2 --max-len-b 5 --num-workers 0 --required-batch-size-multiple 1".split()
    )
    return ["fairseq-generate", data, *PLUGIN, "--path", checkpoint, *fixed]


@pytest.fixture(scope="module")
def checkpoints(run, data, tmp_path_factory):
    """{architecture: its checkpoint after two updates}; the Transformer's holds an argparse.Namespace."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for arch in ("lrn_tiny", "transformer_iwslt_de_en"):
        run(*train(data, arch, folder / arch, 2, *EXTRAS))
    return {path.name: path / "checkpoint_last.pt" for path in folder.iterdir()}


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints["lrn_tiny"]


class Code:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("arch", ["lrn_tiny", "transformer_iwslt_de_en"])
def test_what_fairseq_saves_is_loaded(run, data, checkpoints, arch, tmp_path):
    shutil.copy(checkpoints[arch], tmp_path)
    out = run(*train(data, arch, tmp_path, 3, *EXTRAS))
    assert "Loaded checkpoint" in out
    assert "num_updates=3" in out


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch.load knows one name of a function")
def test_arrays_of_other_versions_of_numpy_are_loaded(run, data, checkpoint, tmp_path):
    """NumPy 2 renamed the function that rebuilds them."""
    mine, other = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    if np.zeros(1).__reduce__()[0].__module__ != "numpy._core.multiarray":
        mine, other = other, mine
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert mine in content
                content = content.replace(mine, other)
            new.writestr(name, content)
    run(*generate(data, tmp_path / "other.pt"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "bool"])
def test_numbers_of_numpy_are_loaded(run, data, checkpoint, dtype, tmp_path):
    """As --best-checkpoint-metric pearson puts them there."""
    state = torch.load(checkpoint, weights_only=True)
    extra = state["extra_state"]
    extra["val_loss"] = extra["best"] = np.ones(1, dtype=dtype)[0]
    for _, _, _, meter in extra["metrics"]["default"]:
        meter.update((name, np.float64(value)) for name, value in meter.items() if type(value) is float)
    torch.save(state, tmp_path / "checkpoint_last.pt")
    out = run(*train(data, "lrn_tiny", tmp_path, 3))
    assert "Loaded checkpoint" in out and "num_updates=3" in out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(run, data, checkpoint, zipped, tmp_path):
    made, path = tmp_path / "made", tmp_path / "checkpoint_last.pt"
    pickle.loads(pickle.dumps(Code(made)))
    made.rmdir()

    state = torch.load(checkpoint, weights_only=True)
    state["extra_state"]["code"] = Code(made)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    for command in (generate(data, path), train(data, "lrn_tiny", tmp_path, 3)):
        last = run(*command, check=False).splitlines()[-1]
        assert last.endswith(
            f"{path} is refused, because it holds posix.mkdir, which is neither data nor fairseq's"
        )
    assert not made.exists()


def test_foreign_objects_in_a_checkpoint_are_refused(checkpoint, tmp_path):
    path = tmp_path / "foreign.pt"
    for foreign, name in ((Path(), "pathlib"), (np.array([None]), "numpy.dtype"), (deque(), "deque")):
        state = torch.load(checkpoint, weights_only=True)
        state["extra_state"]["foreign"] = foreign
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"{path} is refused, because it holds \S*{name}"):
            checkpoint_utils.load_checkpoint_to_cpu(str(path))


def truncated(checkpoint):
    content = checkpoint.read_bytes()
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "make", [truncated, lambda _: b"", lambda _: b"text\n"], ids=["half", "empty", "text"]
)
def test_what_is_damaged_is_refused(run, data, checkpoint, make, tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.write_bytes(make(checkpoint))
    words = f"{path} is damaged or not a checkpoint: PyTorch cannot read its {path.stat().st_size} bytes"
    for command in (generate(data, path), train(data, "lrn_tiny", tmp_path, 3)):
        assert run(*command, check=False).splitlines()[-1].endswith(words)


@pytest.mark.parametrize("make", [lambda state: state["model"], lambda _: [1, 2]], ids=["weights", "list"])
def test_what_is_not_of_fairseq_is_refused(run, data, checkpoint, make, tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save(make(torch.load(checkpoint, weights_only=True)), path)
    words = f"{path} is not a checkpoint of fairseq's: it lacks extra_state, model, optimizer_history"
    assert run(*generate(data, path), check=False).splitlines()[-1].endswith(words)


def test_missing_checkpoints_are_named(run, data, tmp_path):
    last = run(*generate(data, tmp_path / "none.pt"), check=False).splitlines()[-1]
    assert last.endswith(f"Model file not found: {tmp_path / 'none.pt'}")


def test_wrong_dictionaries_are_refused(run, data, checkpoint, tmp_path):
    """One of the right size cannot be told from the right one: a checkpoint does not hold the words."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    words = (data / "dict.en.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for language in ("en", "de"):
        (folder / f"dict.{language}.txt").write_text("".join(words[:-8]), encoding="utf-8")
    shutil.copy(checkpoint, tmp_path)
    out = run(*generate(folder, checkpoint), check=False)
    assert "size mismatch for encoder.embed_tokens.weight" in out
    out = run(*train(folder, "lrn_tiny", tmp_path, 3), check=False)
    assert "size mismatch for encoder.embed_tokens.weight" in out
    assert (
        f"Cannot load model parameters from checkpoint {tmp_path / 'checkpoint_last.pt'}"
        in out.splitlines()[-1]
    )

    (folder / "dict.de.txt").unlink()
    last = run(*generate(folder, checkpoint), check=False).splitlines()[-1]
    assert last.endswith(f"No such file or directory: '{folder / 'dict.de.txt'}'")


def test_missing_and_wrong_models_of_sentencepiece_are_named(run, data, checkpoint, tmp_path):
    model = tmp_path / "spm.model"
    command = ["fairseq-interactive", data, *PLUGIN, "--path", checkpoint, "--cpu", "--bpe", "sentencepiece"]
    command += ["--sentencepiece-model", model]
    assert run(*command, input="a\n", check=False).splitlines()[-1].endswith(f"file {model} not found")
    model.write_text("text\n")
    assert f"could not parse ModelProto from {model}" in run(*command, input="a\n", check=False)


def test_two_processes_resume(start, run, data, tmp_path):
    """Two restarted processes end with the weights of two undisturbed ones."""

    def together(folder, updates):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        options = "--distributed-backend gloo --ddp-backend legacy_ddp --distributed-world-size 2 "
        options += f"--distributed-init-method {address} --distributed-no-spawn"
        command = train(data, "lrn_tiny", tmp_path / folder, updates, *options.split())
        processes = [start(*command, "--distributed-rank", rank) for rank in (0, 1)]
        for process in processes:
            process.join()
            assert process.exitcode == 0, process.output.read_text(encoding="utf-8")[-4000:]
        return torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=True)["model"]

    whole = together("undisturbed", 4)
    together("restarted", 2)
    resumed = together("restarted", 4)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_save_that_fails_at_first_is_whole(tmp_path):
    """A file may hold 1,000 bytes until a write has failed; fairseq then tries again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        checkpoint_utils.torch_persistent_save({"x": torch.ones(1000)}, str(tmp_path / "x.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["x"], torch.ones(1000))
