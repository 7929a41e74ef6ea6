"""examples/inference on slices: of the real data in $SICK, else of pairs made here."""

import itertools
import os
from pathlib import Path

import pytest
from recipes import Recipe, assert_trains_the_same, lines, table, write

SIZES = {"train": 60, "trial": 13, "test_annotated": 21}  # 8 divides no count of results
HEADER = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]
SMALL = """model.encoder_embed_dim=8 model.encoder_hidden_size=8 dataset.batch_size=10
    optimization.max_epoch=2 models=lrn min_count=1""".split()
OPTIONS = "--encoder-embed-dim 8 --encoder-hidden-size 8 --batch-size 10 --max-epoch 2".split()


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


def sick(folder, **changed):
    """A folder as sick.py takes it."""
    rows = made()
    for name, size in SIZES.items():
        taken, rows = rows[:size], rows[size:]
        if "SICK" in os.environ:
            text = (Path(os.environ["SICK"]) / f"SICK_{name}.txt").read_text(encoding="utf-8")
            taken = [line.split("\t") for line in text.split("\n")[1 : size + 1]]
        assert len(taken) == size
        text = "".join("\t".join(row) + "\n" for row in [HEADER, *taken])
        write(folder / f"SICK_{name}.txt", changed.get(name, text))
    return folder


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("sick")
    sick(cwd / "data")
    recipe = Recipe(start, cwd, "inference/sick.py", "--data", "data", *SMALL)
    recipe.work = cwd / "sick"
    recipe.output = recipe()
    return recipe


def test_table(recipe):
    for name, split in (("train", "train"), ("trial", "valid"), ("test_annotated", "test")):
        rows = [line.split("\t") for line in lines(recipe.cwd / f"data/SICK_{name}.txt")[1:]]
        text = {part: lines(recipe.work / f"text/{split}.{part}") for part in ("label", "input0", "input1")}
        assert text["label"] == [row[4] for row in rows]
        for i, part in ((1, "input0"), (2, "input1")):
            # an apostrophe between letters is part of the word, other signs are words
            assert [line.replace(" ", "") for line in text[part]] == [
                row[i].replace(" ", "").lower() for row in rows
            ]
    header, row = table(recipe.output)
    assert len(header) == len(row) == 6
    for accuracy, size in zip(map(float, row[2:4]), (SIZES["trial"], SIZES["test_annotated"])):
        assert accuracy in [round(100 * correct / size, 1) for correct in range(size + 1)]


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    assert_trains_the_same(run, recipe.work, "lrn", tmp_path, *OPTIONS)


def row(*columns):
    return "\t".join(HEADER) + "\n" + "\t".join(columns) + "\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (row("1", "A", "B", "3.0"), "line 2: there are 4 columns, but must be 5"),
        (row("1", "A", "B", "3.0", "NEUTRAL", ""), "line 2: there are 6 columns, but must be 5"),
        (row("1", "A", " ", "3.0", "NEUTRAL"), "line 2: the label NEUTRAL has no text"),
        (row("1", "A", "B", "3.0", "NEU TRAL"), "line 2: the label 'NEU TRAL' has a blank in it"),
        (
            row("1", "A", "B", "3.0", "OTHER"),
            "line 2: the label OTHER is not in the training set, which has C",
        ),
        (
            "A\tB\tC\tD\tE\n",
            "line 1: the columns must have the names entailment_judgment, sentence_A, sentence_B",
        ),
    ],
)
def test_tables_that_are_wrong_are_refused(recipe, tmp_path, text, words):
    data = sick(tmp_path / "data", trial=text)
    message = recipe.refused("--data", str(data), "--work", str(tmp_path / "work"))
    assert f"{data}/SICK_trial.txt, {words}" in message


def test_snli_without_the_pairs_that_have_no_label(run, start, tmp_path):
    """Of its labels all but the first column may be missing."""
    header = "gold_label sentence1_binary_parse sentence1 sentence2 captionID label1 label2 label3".split()
    rows = [
        ["neutral", "( A man )", "A man's hat.", 'He said\u2028"no', "1", "neutral"],
        ["-", "( A man )", "A man's hat.", "Nobody knows", "2", "neutral", "entailment", "neutral"],
        ["entailment", "( )", "Nobody", "A hat", "3", "entailment", "", ""],
    ]
    for split in ("train", "dev", "test"):
        write(
            tmp_path / f"data/snli_1.0_{split}.txt", "".join("\t".join(row) + "\n" for row in [header, *rows])
        )
    recipe = Recipe(start, tmp_path, "inference/snli.py", "--data", "data", *SMALL)
    assert table(recipe())[1][0] == "lrn"
    for split in ("train", "valid", "test"):
        assert lines(tmp_path / f"snli/text/{split}.label") == ["neutral", "entailment"]
        assert lines(tmp_path / f"snli/text/{split}.input0") == ["a man's hat .", "nobody"]
        assert lines(tmp_path / f"snli/text/{split}.input1") == ['he said " no', "a hat"]
    assert_trains_the_same(run, tmp_path / "snli", "lrn", tmp_path / "same", *OPTIONS)
    write(tmp_path / "bad/snli_1.0_train.txt", "\t".join(header) + "\n" + "\t".join(rows[1][1:]) + "\n")
    for split in ("dev", "test"):
        write(tmp_path / f"bad/snli_1.0_{split}.txt", "")
    message = recipe.refused("--data", "bad", "--work", "other")
    assert "bad/snli_1.0_train.txt, line 2: there are 7 columns, but must be 8" in message


@pytest.mark.parametrize("script, name", [("sick", "SICK_train.txt"), ("snli", "snli_1.0_train.txt")])
def test_missing_data(start, tmp_path, script, name):
    recipe = Recipe(start, tmp_path, f"inference/{script}.py", "--data", ".", "--work", "work")
    assert f"there is neither {name} nor {name}.gz in ." in recipe.refused()
    assert "curl" in Recipe(start, tmp_path, f"inference/{script}.py")("--dry-run")
