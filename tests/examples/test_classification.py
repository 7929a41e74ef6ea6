"""examples/classification on slices: of the real data in $SST2, else of sentences and documents made here."""

import itertools
import os
from pathlib import Path

import pytest
from recipes import Recipe, assert_trains_the_same, lines, table, write

SIZES = {"train": 60, "dev": 13, "test": 21}  # 8 divides no count of results
SMALL = """model.encoder_embed_dim=8 model.encoder_hidden_size=8 dataset.batch_size=10
    optimization.max_epoch=2""".split()
OPTIONS = "--encoder-embed-dim 8 --encoder-hidden-size 8 --batch-size 10 --max-epoch 2".split()


def made():
    words = (
        ["a film", "its cast", "the plot", "this ending", "one more sequel"],
        ["is", "was"],
        ["fine", "dull"],
    )
    ends = [".", ", and long .", "again !", "and n't new .", "…"]
    found = [
        f"{int(verdict == 'fine')} {subject} {verb} {verdict} {end}"
        for subject, verb, verdict, end in itertools.product(*words, ends)
    ]
    return [found[i * 37 % len(found)] for i in range(len(found))]


def sst2(folder, **changed):
    """A folder as sst2.py takes it."""
    sentences = made()
    for name, size in SIZES.items():
        taken, sentences = sentences[:size], sentences[size:]
        if "SST2" in os.environ:
            taken = (Path(os.environ["SST2"]) / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:size]
        write(folder / f"{name}.txt", changed.get(name, "".join(line + "\n" for line in taken)))
    return folder


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("sst2")
    sst2(cwd / "data")
    recipe = Recipe(start, cwd, "classification/sst2.py", "--data", "data", *SMALL)
    recipe.work = cwd / "sst2"
    recipe.output = recipe("models=lrn,gru")
    return recipe


def test_table(recipe):
    for name, split in (("train", "train"), ("dev", "valid"), ("test", "test")):
        labels, sentences = (lines(recipe.work / f"text/{split}.{part}") for part in ("label", "input0"))
        assert [" ".join(pair) for pair in zip(labels, sentences)] == lines(recipe.cwd / f"data/{name}.txt")
    header, *rows = table(recipe.output)
    assert [row[0] for row in rows] == ["lrn", "gru"] and {len(row) for row in rows} == {len(header)} == {6}
    assert int(rows[1][1].replace(",", "")) > int(rows[0][1].replace(",", "")) > 100
    valid, test, error = map(float, rows[0][2:5])
    for accuracy, size in ((valid, SIZES["dev"]), (test, SIZES["test"])):
        assert accuracy in [round(100 * correct / size, 1) for correct in range(size + 1)]
    assert error == pytest.approx(100 - test)


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    assert_trains_the_same(run, recipe.work, "lrn", tmp_path, *OPTIONS)


LONG = "cannot read all of test: 1 of 1 have more than 512 tokens, which task.max_positions=601 would allow"


@pytest.mark.parametrize(
    "name, text, where, words",
    [
        ("dev", "1 good\n1\n", "dev.txt, line 2", "the label 1 has no text"),
        ("dev", "1 good\n1 \u00a0\n", "dev.txt, line 2", "the label 1 has no text"),
        ("dev", "1\tgood\n", "dev.txt, line 1", "the label '1\\tgood' has a blank in it"),
        ("dev", "1\u00a0very good\n", "dev.txt, line 1", "has a blank in it"),
        ("dev", "1\u2028very good\n", "dev.txt, line 1", "the label '1\\u2028very' has a blank in it"),
        ("train", "1 good\n</s> bad\n", "train.txt, line 2", "the label </s> is one of fairseq's symbols"),
        ("train", "<unk> good\n", "train.txt, line 1", "the label <unk> is one of fairseq's symbols"),
        ("dev", " good\n", "dev.txt, line 1", "there is no label"),
        ("test", "\n2 good\n", "test.txt, line 2", "the label 2 is not in the training set, which has 0, 1"),
        ("test", "\n\n", "", "there is no text for test"),
        ("train", b"1 good\n0 b\xe4d\n", "train.txt, line 2", "this is not UTF-8"),
        ("test", "1 " + 600 * "good ", "", LONG),
    ],
)  # fmt: skip
def test_text_that_is_wrong_is_refused(recipe, tmp_path, name, text, where, words):
    data = sst2(tmp_path / "data", **{name: text})
    message = recipe.refused("--data", str(data), "--work", str(tmp_path / "work"), "models=lrn")
    assert words in message and (f"{data}/{where}: " if where else "") in message


def test_text_that_looks_odd_is_read(recipe, tmp_path):
    long = "0 " + 600 * "dull "
    train = "\ufeff1 good\u2028film\r\n\r\n0 b\rad\u0085\u00a0film\r\n" + long
    data = sst2(tmp_path / "data", train=train)
    output = recipe("--data", str(data), "--work", str(tmp_path / "work"), "models=lrn")
    text = [line.split() for line in lines(tmp_path / "work/text/train.input0")]
    assert text == [["good", "film"], ["b", "ad", "film"], long.split()[1:]]
    assert "train.txt: line 2 empty, left out" in output
    assert "lrn is trained without some of train: 1 of 3 have more than 512 tokens" in output


def documents(folder, train=None, test='"2","Été","ONE\u2028line"\n"1","","a"\n'):
    rows = [f'"{1 + i % 2}","Title {i}","It\'s a ""quote"",\\nno. {i}"' for i in range(230)]
    write(folder / "train.csv", train or "".join(line + "\n" for line in rows))
    write(folder / "test.csv", test)
    return folder


def test_documents(run, start, tmp_path):
    """Every hundredth document for training validates."""
    recipe = Recipe(start, tmp_path, "classification/documents.py", "--data", "data", *SMALL, "models=lrn")
    documents(tmp_path / "data")
    output = recipe("min_count=1", "--work", "work")
    text = [f'title {i} it\'s a " quote " , no . {i}' for i in range(230)]
    work = tmp_path / "work"
    assert lines(work / "text/valid.input0") == text[99::100]
    assert lines(work / "text/train.input0") == [line for i, line in enumerate(text) if i % 100 != 99]
    assert lines(work / "text/train.label") == [str(1 + i % 2) for i in range(230) if i % 100 != 99]
    assert lines(work / "text/test.input0") == ["été one line", "a"]
    assert table(output)[1][0] == "lrn"
    assert_trains_the_same(run, work, "lrn", tmp_path / "same", *OPTIONS)
    documents(tmp_path / "other", test='"2","","x"\n')
    options = ["min_count=1", "--work", "work", "corpus=yahoo_answers", "--data", "other"]
    assert "before corpus became yahoo_answers (it was yelp_review_polarity)" in recipe.refused(*options)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"test": '"1","a","b"\n\n"2","c"\n'}, "test.csv, line 3: there are 2 columns, but must be 3"),
        ({"test": '"1","a\n\nb","c","d"\n'}, "test.csv, line 1: there are 4 columns, but must be 3"),
        ({"test": '"1","a","b"\n"1","",""\n'}, "test.csv, line 2: the label 1 has no text"),
        (
            {"test": '"3","a","b"\n'},
            "test.csv, line 1: the label 3 is not in the training set, which has 1, 2",
        ),
        ({"test": '"a b","a","b"\n'}, "test.csv, line 1: the label 'a b' has a blank in it"),
        ({"test": '"1","a","b"\n"1","a","b\n"1","a","b"\n'}, "test.csv, line 2: "),
        (
            {"train": '"1","a","b"\n' * 99},
            "train.csv has 99 documents, but needs 100: each 100th validates",
        ),
    ],
)
def test_documents_that_are_wrong_are_refused(start, tmp_path, changed, words):
    documents(tmp_path / "data", **changed)
    recipe = Recipe(start, tmp_path, "classification/documents.py", "--data", "data", *SMALL, "models=lrn")
    assert words in recipe.refused("--work", "work")
    assert "corpus is none, but must be amazon_review_polarity or" in recipe.refused("corpus=none")


def test_a_field_of_any_length_is_read(start, tmp_path):
    long = "word " * 40000
    rows = f'"1","a","{long}"\n"2","b\rc","d\ne"\n' * 100
    documents(tmp_path / "data", train=rows, test='"1","a","b"\n')
    recipe = Recipe(start, tmp_path, "classification/documents.py", "--data", "data", "models=lrn")
    assert "min_count is -1" in recipe.refused("min_count=-1")
    recipe("--work", "work", *SMALL, "optimization.max_epoch=1", "task.max_positions=20")
    text = lines(tmp_path / "work/text/train.input0")
    assert text[0] == ("a " + long).strip() and text[1] == "b c d e" and len(text) == 198
