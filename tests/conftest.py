"""Data and commands that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def run():
    """Run one of fairseq's commands as a user would, on the CPU; returns its output, stderr included."""

    def command(*words, input=None, check=True):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [str(Path(sys.executable).parent / str(words[0])), *map(str, words[1:])],
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        if check:
            assert done.returncode == 0, done.stdout[-4000:]
        else:
            assert done.returncode != 0, done.stdout[-4000:]
        return done.stdout

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
