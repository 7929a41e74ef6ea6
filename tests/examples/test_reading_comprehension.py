"""examples/reading_comprehension on a slice: of the real data in $XQUAD, else of articles made here."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from recipes import Recipe

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "reading_comprehension"
sys.path.insert(0, str(FOLDER))

from squad import read, tokenize  # noqa: E402


def question(text, passage, *answers, id="q"):
    """As SQuAD has it; an answer is a text, of which the first occurrence is meant, or a text and a place."""
    pairs = [x if isinstance(x, tuple) else (x, passage.index(x)) for x in answers]
    answers = [{"text": answer, "answer_start": start} for answer, start in pairs]
    return {"id": id, "question": text, "answers": answers}


def write(path, passage, *questions):
    data = [{"title": "t", "paragraphs": [{"context": passage, "qas": questions}]}]
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path


def test_tokens_keep_their_places():
    text = " Levi's\u00a0Stadium,\n  $1.2m (naïve\u2028Ærø)—½ "
    tokens = [text[begin:end] for begin, end in tokenize(text)]
    assert tokens == [*"Levi ' s Stadium , $ 1 . 2m ( naïve Ærø ) — ½".split()]
    assert "".join(tokens) == "".join(text.split())


def test_answers_become_spans_of_tokens(tmp_path):
    passage = "In  1869, Ærø's 2,500km coast (east) was mapped; east again."
    path = write(
        tmp_path / "x.json",
        passage,
        question("When?", passage, "1869", id="a"),
        question("Where?", passage, ("east", 49), "coast (east)", id="b"),
        question("How long?", passage, "2,500", "Ærø", id="c"),
        question("What?", passage, " coast ", id="d"),
    )
    [row], questions, widened = read(path)
    words = [row["text"][begin:end] for begin, end in row["tokens"]]
    spans = [words[first : last + 1] for first, last in (x["span"] for x in questions)]
    assert spans == [["1869"], ["east"], ["2", ",", "500km"], ["coast"]]
    assert questions[1]["span"][0] == len(words) - 3
    assert questions[1]["answers"] == ["east", "coast (east)"]
    assert [x["tokens"] for x in questions][2] == ["How", "long", "?"]
    assert widened == 1
    assert row["text"] == passage


PASSAGE = "one two three"


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (
            [question("x", PASSAGE, ("two", 5))],
            "question q: the passage does not have the answer 'two' at char",
        ),
        ([question("x", PASSAGE, ("two", 400))], "does not have the answer 'two' at character 400"),
        ([question("x", PASSAGE, (" ", 3))], "does not have the answer ' ' at character 3"),
        ([question("x", PASSAGE)], "question q: the question must have words and at least one answer"),
        ([question(" ", PASSAGE, "one")], "question q: the question must have words and at least one answer"),
        ([question("x", PASSAGE, "one")] * 2, "question q: another question has the same id"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, questions, words):
    path = write(tmp_path / "bad.json", PASSAGE, *questions)
    with pytest.raises(ValueError, match=re.escape(f"{path}, ")) as error:
        read(path)
    assert words in str(error.value)


def made(article):
    colours = ["red", "dark green", "blue", "grey"]
    paragraphs = []
    for i in range(2):
        passage = f"Car {article} is {colours[(article + i) % 4]}. House {article} is {colours[article % 3]}!"
        qas = [
            question(f"What is {kind} {article}?", passage, re.search(f"{kind} .*? is ([a-z ]+)", passage)[1])
            for kind in ("Car", "House")
        ]
        for kind, qa in zip("CH", qas):
            qa["id"] = f"{article}-{i}-{kind}"
        paragraphs.append({"context": passage, "qas": qas})
    return {"title": str(article), "paragraphs": paragraphs}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as XQUAD takes it, of ten articles."""
    folder = tmp_path_factory.mktemp("data")
    if "XQUAD" in os.environ:
        real = json.loads(Path(os.environ["XQUAD"], "xquad.en.json").read_text(encoding="utf-8"))["data"]
        articles = [{"title": x["title"], "paragraphs": x["paragraphs"][:1]} for x in real[:10]]
    else:
        articles = [made(i) for i in range(10)]
    (folder / "xquad.en.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    return Recipe("reading_comprehension", tmp_path_factory.mktemp("cwd"), XQUAD=str(data), MAX_EPOCH="1")


SHORT = ["--", "--encoder-hidden-size", "8", "--log-interval", "1"]


@pytest.fixture(scope="module")
def done(recipe):
    return recipe("squad.sh", "lrn", *SHORT)


def test_table(recipe, done):
    assert done.returncode == 0, done.stderr[-4000:]
    header, line, row = ([x.strip() for x in row.split("|")[1:-1]] for row in done.stdout.splitlines())
    assert header[:4] == ["unit", "parameters", "train EM", "F1"]
    assert len(header) == len(line) == len(row) == 9
    assert row[0] == "lrn"
    assert int(row[1].replace(",", "")) > 1000
    assert all(0 <= float(em) <= float(f1) <= 100 for em, f1 in zip(row[2:8:2], row[3:8:2]))
    assert float(row[8]) > 0


def test_every_article_is_in_one_split_and_every_question_is_answered(recipe, done, data):
    articles = {
        split: json.loads((recipe.work / "json" / f"{split}.json").read_text())["data"]
        for split in ("train", "valid", "test")
    }
    titles = [[x["title"] for x in articles[split]] for split in articles]
    real = json.loads((data / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    assert titles == [[x["title"] for x in part] for part in (real[:8], real[8:9], real[9:])]
    counts = [int(row.split(" ")[1]) for row in (recipe.work / "bin" / "dict.txt").read_text().splitlines()]
    assert min(counts) >= 2 and counts == sorted(counts, reverse=True)
    asked = [qa["id"] for paragraph in articles["test"][0]["paragraphs"] for qa in paragraph["qas"]]
    answers = json.loads((recipe.work / "lrn" / "answers.json").read_text())
    assert sorted(answers) == sorted(asked)
    passages = [paragraph["context"] for paragraph in articles["test"][0]["paragraphs"]]
    assert all(any(answer in passage for passage in passages) for answer in answers.values())


def test_a_second_run_repeats_the_table_only(recipe, done):
    files = list(recipe.work.glob("*/*"))
    before = {path: path.stat().st_mtime_ns for path in files}
    again = recipe("squad.sh", "lrn", *SHORT)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again.stdout == done.stdout


def test_other_settings_are_no_reason_to_train_on(recipe, done):
    for words, settings in ((["lrn"], {}), (["lrn", *SHORT], {"MAX_EPOCH": "2"})):
        failed = recipe("squad.sh", *words, **settings)
        assert failed.returncode != 0
        assert "is of another training, MAX_EPOCH=1 --encoder-hidden-size 8" in failed.stderr


def test_a_failure_names_its_step(recipe, done):
    failed = recipe("squad.sh", "gru", "atr", "--", "--no-such-option")
    assert failed.returncode != 0
    assert failed.stderr.count("== training") == 1
    assert "failed in step: training gru" in failed.stderr


@pytest.mark.parametrize(
    ("settings", "words", "step"),
    [
        ({"XQUAD": "/nowhere"}, "XQUAD=/nowhere is not a folder", "JSON"),
        ({"DATASET": "squad", "SQUAD": "."}, "no train-v1.1.json in SQUAD=.", "JSON"),
        ({"DATASET": "trivia"}, "DATASET is trivia, but must be xquad or squad", "arguments"),
    ],
)
def test_missing_data(recipe, tmp_path, settings, words, step):
    failed = recipe("squad.sh", "lrn", WORK=str(tmp_path / "work"), **settings)
    assert failed.returncode != 0
    assert words in failed.stderr
    assert f"failed in step: {step}" in failed.stderr


def test_too_few_articles(recipe, tmp_path):
    (tmp_path / "xquad.en.json").write_text(json.dumps({"data": [made(i) for i in range(9)]}))
    failed = recipe("squad.sh", "lrn", WORK=str(tmp_path / "work"), XQUAD=str(tmp_path))
    assert "has 9 articles, but must have at least 10" in failed.stderr
    assert "failed in step: splits" in failed.stderr
