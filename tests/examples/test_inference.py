"""examples/inference on slices: of the real data in $SICK, else of pairs made here."""

import itertools
import os
from pathlib import Path

import pytest
from recipes import Recipe, lines

SIZES = {"train": 60, "trial": 13, "test_annotated": 21}  # 8 divides no count of results
HEADER = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]
SMALL = "--encoder-embed-dim 8 --encoder-hidden-size 8 --batch-size 10 --log-interval 1".split()


def made():
    sentences = [
        f"{who} is {what}" for who in ("A man", "A dog", "No cat") for what in ("there", "asleep", "lost")
    ]
    rows = []
    for first, second in itertools.product(sentences, repeat=2):
        label = "ENTAILMENT" if first == second else "NEUTRAL" if first[0] == second[0] else "CONTRADICTION"
        rows.append(["0", first, second, "3.0", label])
    rows *= 2
    return [rows[i * 37 % len(rows)] for i in range(len(rows))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as SICK takes it."""
    folder = tmp_path_factory.mktemp("data")
    rows = made()
    for name, size in SIZES.items():
        taken, rows = rows[:size], rows[size:]
        if "SICK" in os.environ:
            text = (Path(os.environ["SICK"]) / f"SICK_{name}.txt").read_text(encoding="utf-8")
            taken = [line.split("\t") for line in text.split("\n")[1 : size + 1]]
        assert len(taken) == size
        text = "".join("\t".join(row) + "\n" for row in [HEADER, *taken])
        (folder / f"SICK_{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe("inference", tmp_path_factory.mktemp("cwd"), MAX_EPOCH="2")


def test_table_and_training_that_goes_on(recipe, data):
    done = recipe("sick.sh", "lrn", "--", *SMALL, SICK=str(data))
    assert done.returncode == 0, done.stderr[-4000:]
    for name, split in (("train", "train"), ("trial", "valid"), ("test_annotated", "test")):
        rows = [line.split("\t") for line in lines(data / f"SICK_{name}.txt")[1:]]
        raw = {part: lines(recipe.work / "raw" / f"{split}.{part}") for part in ("label", "input0", "input1")}
        assert raw["label"] == [row[4] for row in rows]
        for i, part in ((1, "input0"), (2, "input1")):
            # an apostrophe between letters is part of the word, other signs are words
            assert [line.replace(" ", "") for line in raw[part]] == [
                row[i].replace(" ", "").lower() for row in rows
            ]
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    assert len(header) == len(row) == 6
    for accuracy, size in zip(map(float, row[2:4]), (SIZES["trial"], SIZES["test_annotated"])):
        assert accuracy in [round(100 * correct / size, 1) for correct in range(size + 1)]

    (recipe.work / "lrn" / "trained").unlink()
    again = recipe("sick.sh", "lrn", "--", *SMALL, SICK=str(data))
    assert again.returncode == 0, again.stderr[-4000:]
    assert "Loaded checkpoint" in (recipe.work / "lrn" / "train.log").read_text()
    assert again.stdout == done.stdout


def test_snli_without_the_pairs_that_have_no_label(recipe, tmp_path):
    """The text is prepared; an option that is none ends the training that follows.

    With a folder for binary data there, fairseq-preprocess is taken for done.
    """
    (recipe.work.parent / "snli" / "bin").mkdir(parents=True)
    rows = [
        ["gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "captionID"],
        ["neutral", "( A man )", "A man's hat.", 'He said "no', "1"],
        ["-", "( A man )", "A man's hat.", "Nobody knows", "2"],
        ["entailment", "( )", "", "A hat", "3"],
    ]
    for split in ("train", "dev", "test"):
        (tmp_path / f"snli_1.0_{split}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    done = recipe("snli.sh", "lrn", "--", "--no-such-option", SNLI=str(tmp_path), WORK="snli", MIN_COUNT="1")
    assert done.returncode != 0
    assert "failed in step: training lrn" in done.stderr
    raw = recipe.work.parent / "snli" / "raw"
    for split in ("train", "valid", "test"):
        assert lines(raw / f"{split}.label") == ["neutral", "entailment"]
        assert lines(raw / f"{split}.input0") == ["a man's hat .", ""]
        assert lines(raw / f"{split}.input1") == ['he said " no', "a hat"]


@pytest.mark.parametrize(
    "script, variable, name",
    [("sick.sh", "SICK", "SICK_train.txt"), ("snli.sh", "SNLI", "snli_1.0_train.txt")],
)
def test_missing_data(recipe, tmp_path, script, variable, name):
    done = recipe(script, **{variable: str(tmp_path)}, WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert f"no {name} in {variable}={tmp_path}" in done.stderr
    assert "failed in step: raw text" in done.stderr
