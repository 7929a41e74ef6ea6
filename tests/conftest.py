"""Data and commands that several test files share."""

import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# for the scripts, which call `python`: this one, activated or not
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import forked  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # its LSTM and GRU would round what they multiply to 10 bits
torch.set_num_threads(1)

# These first, so that at the end no worker is left with a long one.
LONGEST = [
    "models/test_parity.py",
    "examples/test_translation.py",
    "tasks/test_translation.py",
    "examples/test_efficiency.py",
    "models/test_lrn_reader.py",
    "test_packaging.py",
]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also check fairseq's own models beside lrn")


def pytest_collection_modifyitems(items):
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start one of fairseq's commands as a user would, on the CPU; returns the process, with its output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()

    def command(*words, input="", before=""):
        folder = tmp_path_factory.mktemp("command")
        (folder / "input").write_text(input, encoding="utf-8")
        # a script's own path stays
        words = [str(Path(sys.executable).parent / words[0]), *map(str, words[1:])]
        files = (str(folder / name) for name in ("input", "output"))
        process = context.Process(target=forked.execute, args=(words, *files, before))
        process.output = folder / "output"
        process.start()
        return process

    yield command
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope="session")
def run(start):
    """Run one of fairseq's commands as a user would, on the CPU; returns its output, stderr included."""

    def command(*words, input="", check=True):
        process = start(*words, input=input)
        process.join()
        output = process.output.read_text(encoding="utf-8")
        assert (process.exitcode == 0) == check, output[-4000:]
        return output

    return command


@pytest.fixture(scope="session")
def run_twice(start):
    """Run a fairseq-train command as two processes that train together; returns the first one's output."""

    def command(*words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words += (
            *("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--distributed-world-size", 2),
            *("--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-no-spawn"),
        )
        processes = [start(*words, "--distributed-rank", rank) for rank in (0, 1)]
        # once one has failed, the other would wait for it
        while any(process.is_alive() for process in processes) and not any(
            process.exitcode for process in processes
        ):
            processes[0].join(0.1)
        outputs = [process.output.read_text(encoding="utf-8") for process in processes]
        for process, output in zip(processes, outputs):
            process.kill()
            assert process.exitcode == 0, output[-4000:]
        return outputs[0]

    return command


@pytest.fixture(scope="session")
def test_sentences(corpus):
    """The source side of the test set, in pieces; 8 does not divide their number."""
    return (corpus / "test.en").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A few English-German sentence pairs from CLDR, cut into sentencepiece's pieces."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    import make_corpus
    import sentencepiece

    folder = tmp_path_factory.mktemp("corpus")
    sets = make_corpus.build(train=2000, test=21)
    sets = {"train": sets["train"][-150:], "valid": sets["train"][:21], "test": sets["test"]}
    text = [sentence for pairs in sets.values() for pair in pairs for sentence in pair]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=folder / "spm", vocab_size=300, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for name, pairs in sets.items():
        for side, language in enumerate(("en", "de")):
            lines = (" ".join(model.encode(pair[side], out_type=str)) + "\n" for pair in pairs)
            (folder / f"{name}.{language}").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(run, corpus, tmp_path_factory):
    """The corpus as fairseq's binary data, with one dictionary for both languages."""
    folder = tmp_path_factory.mktemp("data")
    prefixes = [f"--{name}pref={corpus / name}" for name in ("train", "valid", "test")]
    run("fairseq-preprocess", "-s", "en", "-t", "de", "--joined-dictionary", *prefixes, "--destdir", folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Let a test set the number of PyTorch's threads for itself alone."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["default", "avx2", "avx512"])
def instruction_set(request):
    """Run a test with each compiled version of the CPU kernels that this machine has."""
    import fairseq_lrn.ops  # noqa: F401  loads them

    operators = torch.ops.fairseq_lrn
    if not hasattr(operators, "set_cpu_capability"):
        pytest.skip("the operators are not compiled")
    before = operators.cpu_capability()
    try:
        operators.set_cpu_capability(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    operators.set_cpu_capability(before)
