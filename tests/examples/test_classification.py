"""examples/classification on slices: of the real data in $SST2, else of sentences and documents made here."""

import itertools
import os
from pathlib import Path

import pytest
from recipes import Recipe, lines

SIZES = {"train": 60, "dev": 13, "test": 21}  # 8 divides no count of results
SMALL = "--encoder-embed-dim 8 --encoder-hidden-size 8 --batch-size 10 --log-interval 1".split()


def made():
    words = (
        ["a film", "its cast", "the plot", "this ending", "one more sequel"],
        ["is", "was"],
        ["fine", "dull"],
    )
    ends = [".", ", and long .", "again !", "and n't new .", "…"]
    lines = [
        f"{int(verdict == 'fine')} {subject} {verb} {verdict} {end}"
        for subject, verb, verdict, end in itertools.product(*words, ends)
    ]
    return [lines[i * 37 % len(lines)] for i in range(len(lines))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as SST2 takes it."""
    folder = tmp_path_factory.mktemp("data")
    sentences = made()
    for name, size in SIZES.items():
        taken, sentences = sentences[:size], sentences[size:]
        if "SST2" in os.environ:
            taken = (Path(os.environ["SST2"]) / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:size]
        assert len(taken) == size
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in taken), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe("classification", tmp_path_factory.mktemp("cwd"), MAX_EPOCH="2")


@pytest.fixture(scope="module")
def lrn(recipe, data):
    return recipe("sst2.sh", "lrn", "--", *SMALL, SST2=str(data))


def test_table(recipe, data, lrn):
    assert lrn.returncode == 0, lrn.stderr[-4000:]
    for name, split in (("train", "train"), ("dev", "valid"), ("test", "test")):
        labels, sentences = (lines(recipe.work / "raw" / f"{split}.{part}") for part in ("label", "input0"))
        assert [" ".join(pair) for pair in zip(labels, sentences)] == lines(data / f"{name}.txt")
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lrn.stdout.splitlines())
    assert len(header) == len(row) == 6
    assert row[0] == "lrn"
    assert int(row[1].replace(",", "")) > 100
    valid, test, error, seconds = map(float, row[2:])
    for accuracy, size in ((valid, SIZES["dev"]), (test, SIZES["test"])):
        assert accuracy in [round(100 * correct / size, 1) for correct in range(size + 1)]
    assert error == pytest.approx(100 - test)
    assert seconds > 0


def test_a_second_run_repeats_the_table_only(recipe, data, lrn):
    files = [path for path in recipe.work.rglob("*") if path.is_file() and path.name != ".gitignore"]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = recipe("sst2.sh", "lrn", "--", *SMALL, SST2=str(data))
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again.stdout == lrn.stdout


def test_a_training_with_other_options_is_another_one(recipe, data, lrn):
    done = recipe("sst2.sh", "lrn", "--", "--dropout", "0", SST2=str(data))
    assert done.returncode != 0
    assert "work/lrn is of another training" in done.stderr
    assert "failed in step: training lrn" in done.stderr


def test_documents_are_prepared(recipe, tmp_path):
    """Every hundredth one for training validates; an option that is none ends the training that follows.

    With a folder for binary data there, fairseq-preprocess is taken for done.
    """
    (recipe.work.parent / "documents" / "bin").mkdir(parents=True)
    train = [f'"{1 + i % 2}","Title {i}","It\'s a ""quote"",\\nno. {i}"' for i in range(230)]
    (tmp_path / "train.csv").write_text("".join(line + "\n" for line in train))
    (tmp_path / "test.csv").write_text('"2","Été","ONE\u2028line"\n"1","",""\n', encoding="utf-8")
    done = recipe(
        "documents.sh", "lrn", "--", "--no-such-option", CSV=str(tmp_path), WORK="documents", MIN_COUNT="1"
    )
    assert done.returncode != 0
    assert "unrecognized arguments: --no-such-option" in done.stderr
    assert "failed in step: training lrn" in done.stderr
    raw = recipe.work.parent / "documents" / "raw"
    text = [f'title {i} it\'s a " quote " , no . {i}' for i in range(230)]
    assert lines(raw / "valid.input0") == text[99::100]
    assert lines(raw / "train.input0") == [line for i, line in enumerate(text) if i % 100 != 99]
    assert lines(raw / "train.label") == [str(1 + i % 2) for i in range(230) if i % 100 != 99]
    assert lines(raw / "test.input0") == ["été one line", ""]
    assert lines(raw / "test.label") == ["2", "1"]


@pytest.mark.parametrize(
    "script, variable, name, message",
    [
        ("sst2.sh", "SST2", "nowhere", "nowhere is not a folder"),
        ("documents.sh", "CSV", "", "no train.csv in CSV="),
    ],
    ids=["folder", "file"],
)
def test_missing_data(recipe, tmp_path, script, variable, name, message):
    done = recipe(script, **{variable: str(tmp_path / name)}, WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert message in done.stderr
    assert "failed in step: raw text" in done.stderr
