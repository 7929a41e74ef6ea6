"""examples/translation/multi30k.sh on a slice: of the real data in $MULTI30K, else of sentences made here."""

import gzip
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[2] / "examples/translation/multi30k.sh"
SIZES = {"train": 90, "val": 10, "test_2016_flickr": 11}  # 8 divides no count of results


def read(folder, name):
    plain = Path(folder) / name
    if plain.exists():
        return plain.read_text(encoding="utf-8").split("\n")
    return gzip.decompress((Path(folder) / f"{name}.gz").read_bytes()).decode("utf-8").split("\n")


def made():
    subjects = [
        ("A man", "Ein Mann"),
        ("A woman", "Eine Frau"),
        ("A child", "Ein Kind"),
        ("A dog", "Ein Hund"),
    ]
    verbs = [("walks", "läuft"), ("sleeps", "schläft"), ("stands", "steht"), ("waits", "wartet")]
    places = [
        ("in the park", "im Park"),
        ("on the street", "auf der Straße"),
        ("by the lake", "am See"),
        ("in the house", "im Haus"),
        ("under a tree", "unter einem Baum"),
        ("at the station", "am Bahnhof"),
        ("in the snow", "im Schnee"),
    ]
    pairs = [zip(*words) for words in itertools.product(subjects, verbs, places)]
    return [tuple(" ".join(side) + "." for side in pair) for pair in pairs]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as MULTI30K takes it, its training text compressed, the rest not."""
    folder = tmp_path_factory.mktemp("data")
    sentences = made()
    for name, size in SIZES.items():
        taken, sentences = sentences[:size], sentences[size:]
        for side, lang in enumerate(["en", "de"]):
            if "MULTI30K" in os.environ:
                lines = read(os.environ["MULTI30K"], f"{name}.{lang}")[:size]
            else:
                lines = [pair[side] for pair in taken]
            assert len(lines) == size
            text = "".join(line + "\n" for line in lines).encode("utf-8")
            if name == "train":
                (folder / f"{name}.{lang}.gz").write_bytes(gzip.compress(text))
            else:
                (folder / f"{name}.{lang}").write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    """Run the script in a folder of its own, writing to work/ there; one update is one epoch."""
    cwd = tmp_path_factory.mktemp("cwd")

    def run(*words, **settings):
        env = {
            **os.environ,
            "PYTHONWARNINGS": "ignore",
            "MULTI30K": str(data),
            "WORK": "work",
            "VOCAB_SIZE": "300" if "MULTI30K" in os.environ else "100",
            "MAX_UPDATE": "3",
            "AVERAGE": "0",
            **settings,
        }
        return subprocess.run(["bash", str(RECIPE), *words], cwd=cwd, env=env, capture_output=True, text=True)

    run.work = cwd / "work"
    return run


SHORT = ["--max-tokens", "20000", "--max-target-positions", "100"]
AVERAGED = {"AVERAGE": "2"}


def lines(path):
    return path.read_bytes().count(b"\n")


@pytest.fixture(scope="module")
def transformer(recipe):
    return recipe("transformer", *SHORT)


@pytest.fixture(scope="module")
def lrn(recipe):
    return recipe("lrn_tiny", *SHORT, **AVERAGED)


@pytest.mark.parametrize("arch, name", [("transformer", "best"), ("lrn_tiny", "average2")])
def test_as_many_translations_as_sentences(recipe, transformer, lrn, arch, name):
    done = {"transformer": transformer, "lrn_tiny": lrn}[arch]
    assert done.returncode == 0, done.stderr[-4000:]
    assert lines(recipe.work / "raw" / "test.en") == SIZES["test_2016_flickr"]
    assert lines(recipe.work / arch / f"{name}.de") == SIZES["test_2016_flickr"]
    assert "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in done.stdout
    assert "chrF2|nrefs:1|case:mixed|" in done.stdout


def test_a_second_run_repeats_the_scores_only(recipe, lrn):
    files = [
        path for folder in ("lrn_tiny", "bin", "bpe", "raw") for path in (recipe.work / folder).iterdir()
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = recipe("lrn_tiny", *SHORT, **AVERAGED)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again.stdout.splitlines() == lrn.stdout.splitlines()[-2:]


def test_a_lost_translation_is_an_error(recipe, transformer):
    source = recipe.work / "raw" / "test.en"
    text = source.read_bytes()
    source.write_bytes(text + b"One more.\n")
    try:
        done = recipe("transformer", *SHORT)
    finally:
        source.write_bytes(text)
    assert done.returncode != 0
    assert "11 translations of 12 sentences" in done.stderr
    assert "failed in step: scoring" in done.stderr


def test_average_is_the_mean_of_the_last_epochs(recipe, lrn):
    def load(name):
        return torch.load(recipe.work / "lrn_tiny" / f"checkpoint{name}.pt", weights_only=True)["model"]

    first, second, third, average = load(1), load(2), load(3), load("_average2")
    assert average.keys() == third.keys()
    for key in average:
        torch.testing.assert_close(average[key], (second[key] + third[key]) / 2)
    key = "decoder.embed_tokens.weight"
    assert not torch.allclose(average[key], third[key], rtol=0, atol=1e-8)
    assert not torch.allclose(average[key], (first[key] + second[key] + third[key]) / 3, rtol=0, atol=1e-8)


def test_average_of_more_epochs_than_there_are(recipe, lrn):
    done = recipe("lrn_tiny", *SHORT, AVERAGE="9")
    assert done.returncode != 0
    assert "count is 9, and work/lrn_tiny holds 3 epoch checkpoints" in done.stderr
    assert "failed in step: averaging 9 checkpoints" in done.stderr


def test_compare_prints_a_table(recipe, transformer):
    done = recipe("compare", "transformer", ROUNDS="1", SPEED_UPDATES="4")
    assert done.returncode == 0, done.stderr[-4000:]
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    assert len(header) == len(row) == 6
    assert row[0] == "transformer"
    assert int(row[1].replace(",", "")) > 1_000_000
    assert all(0 <= float(score) <= 100 for score in row[2:4])
    assert all(float(speed) > 0 for speed in row[4:])


def test_compare_needs_a_trained_model(recipe):
    done = recipe("compare", "lrn_wmt_en_de")
    assert done.returncode != 0
    assert "train and translate with RUN=lrn_wmt_en_de first" in done.stderr


def test_missing_folder(recipe, tmp_path):
    done = recipe("lrn_tiny", MULTI30K=str(tmp_path / "nowhere"), WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert f"MULTI30K={tmp_path}/nowhere is not a folder" in done.stderr
    assert "failed in step: raw text" in done.stderr


def test_missing_file(recipe, tmp_path):
    done = recipe("lrn_tiny", MULTI30K=str(tmp_path), WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert f"neither train.en nor train.en.gz in MULTI30K={tmp_path}" in done.stderr


def test_no_architecture(recipe):
    done = recipe()
    assert done.returncode != 0
    assert "usage:" in done.stderr
