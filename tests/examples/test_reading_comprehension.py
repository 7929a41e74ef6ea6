"""examples/reading_comprehension on a slice: of the real data in $XQUAD, else of articles made here."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
from recipes import EXAMPLES, Recipe, assert_trains_the_same, lines, table, times, write

sys.path.insert(0, str(EXAMPLES))
spec = importlib.util.spec_from_file_location("squad", EXAMPLES / "reading_comprehension/squad.py")
squad = importlib.util.module_from_spec(spec)
spec.loader.exec_module(squad)


def question(text, passage, *answers, id="q"):
    """As SQuAD has it; an answer is a text, of which the first occurrence is meant, or a text and a place."""
    pairs = [x if isinstance(x, tuple) else (x, passage.index(x)) for x in answers]
    answers = [{"text": answer, "answer_start": start} for answer, start in pairs]
    return {"id": id, "question": text, "answers": answers}


def one(path, passage, *questions):
    """A file of one passage, as PowerShell writes it."""
    data = [{"title": "t", "paragraphs": [{"context": passage, "qas": questions}]}]
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8-sig")
    return path


def test_tokens_keep_their_places():
    text = " Levi's\u00a0Stadium,\n  $1.2m (naïve\u2028Ærø)—½ "
    tokens = [text[begin:end] for begin, end in squad.tokenize(text)]
    assert tokens == [*"Levi ' s Stadium , $ 1 . 2m ( naïve Ærø ) — ½".split()]
    assert "".join(tokens) == "".join(text.split())


def test_answers_become_spans_of_tokens(tmp_path):
    passage = "In  1869, Ærø's 2,500km coast (east) was mapped; east again."
    path = one(
        tmp_path / "x.json",
        passage,
        question("When?", passage, "1869", id="a"),
        question("Where?", passage, ("east", 49), "coast (east)", id="b"),
        question("How long?", passage, "2,500", "Ærø", id="c"),
        question("What?", passage, " coast ", id="d"),
    )
    [row], questions, widened = squad.read(squad.load(path))
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
    path = one(tmp_path / "bad.json", PASSAGE, *questions)
    with pytest.raises(squad.Refused, match=re.escape(f"{path}, ")) as error:
        squad.load(path)
    assert words in str(error.value)


def like(context=PASSAGE, start=4, text="two", **asked):
    """A file of one question, as JSON."""
    question = {"id": "q", "question": "x", "answers": [{"text": text, "answer_start": start}], **asked}
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [question]}]}]})


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"data": [\n{]}', "line 2: this is not JSON: "),
        ("[]", "is not in the form of SQuAD 1.1: TypeError"),
        ('{"data": [{"title": "t"}]}', "is not in the form of SQuAD 1.1: KeyError 'paragraphs'"),
        (b'{"data": "\xff"}', "is not UTF-8"),
        (
            like(context=None),
            "is not in the form of SQuAD 1.1: TypeError a context, an id or a question is no",
        ),
        (like(question=None), "a context, an id or a question is not text"),
        (like(id=[1]), "a context, an id or a question is not text"),
        (like(start=4.0), "TypeError an answer is not text, or its start is not a whole number"),
        (like(text=1), "an answer is not text, or its start is not a whole number"),
        (like(question="\ud800 what?"), "surrogates not allowed"),
    ],
)
def test_what_is_no_json_of_squads_is_refused(tmp_path, text, words):
    write(tmp_path / "x.json", text)
    with pytest.raises(squad.Refused, match=re.escape(str(tmp_path / "x.json"))) as error:
        squad.load(tmp_path / "x.json")
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


OPTIONS = "--encoder-hidden-size 8 --log-interval 1 --max-epoch 1".split()


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    """A run on ten articles."""
    cwd = tmp_path_factory.mktemp("squad")
    articles = [made(i) for i in range(10)]
    if "XQUAD" in os.environ:
        real = json.loads(Path(os.environ["XQUAD"], "xquad.en.json").read_text(encoding="utf-8"))["data"]
        articles = [{"title": x["title"], "paragraphs": x["paragraphs"][:1]} for x in real[:10]]
    write(cwd / "data/xquad.en.json", "\ufeff" + json.dumps({"data": articles}))
    short = "model.encoder_hidden_size=8 common.log_interval=1 optimization.max_epoch=1 models=lrn".split()
    recipe = Recipe(start, cwd, "reading_comprehension/squad.py", "--data", "data", *short)
    recipe.articles, recipe.work = articles, cwd / "xquad"
    recipe.output = recipe()
    return recipe


def test_table(recipe):
    header, row = table(recipe.output)
    assert header[:4] == ["unit", "parameters", "train EM", "train F1"]
    assert len(header) == len(row) == 9
    assert row[0] == "lrn" and int(row[1].replace(",", "")) > 1000
    assert all(0 <= float(em) <= float(f1) <= 100 for em, f1 in zip(row[2:8:2], row[3:8:2]))
    assert float(row[8]) > 0


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    assert_trains_the_same(run, recipe.work, "lrn", tmp_path, *OPTIONS)


def test_every_article_is_in_one_split_and_every_question_is_answered(recipe):
    articles = {
        split: json.loads((recipe.work / f"text/{split}.json").read_text())["data"]
        for split in ("train", "valid", "test")
    }
    titles = [[x["title"] for x in articles[split]] for split in articles]
    real = recipe.articles
    assert titles == [[x["title"] for x in part] for part in (real[:8], real[8:9], real[9:])]
    counts = [int(row.split(" ")[1]) for row in lines(recipe.work / "bin/dict.txt")]
    assert min(counts) >= 2 and counts == sorted(counts, reverse=True)
    asked = [qa["id"] for paragraph in articles["test"][0]["paragraphs"] for qa in paragraph["qas"]]
    answers = json.loads((recipe.work / "runs/lrn/answers.json").read_text())
    assert sorted(answers) == sorted(asked)
    passages = [paragraph["context"] for paragraph in articles["test"][0]["paragraphs"]]
    assert all(any(answer in passage for passage in passages) for answer in answers.values())


def test_a_second_run_repeats_the_table_only(recipe):
    before = times(recipe.work)
    assert table(recipe()) == table(recipe.output)
    assert times(recipe.work) == before


def test_missing_data(recipe, tmp_path):
    assert "--data nowhere is not a folder" in recipe.refused("--data", "nowhere")
    missing = recipe.refused("corpus=squad", "--work", str(tmp_path / "work"))
    assert "neither train-v1.1.json nor train-v1.1.json.gz in data" in missing
    assert "corpus is trivia, but must be xquad or squad" in recipe.refused("corpus=trivia")
    write(tmp_path / "xquad.en.json", json.dumps({"data": [made(i) for i in range(9)]}))
    few = recipe.refused("--data", str(tmp_path), "--work", str(tmp_path / "work"))
    assert f"{tmp_path}/xquad.en.json has 9 articles, but must have at least 10" in few


def test_squad_has_its_splits(start, tmp_path):
    for name, articles in (("train-v1.1", range(4)), ("dev-v1.1", [9])):
        write(tmp_path / f"data/{name}.json", json.dumps({"data": [made(i) for i in articles]}))
    recipe = Recipe(start, tmp_path, "reading_comprehension/squad.py", "--data", "data", "corpus=squad")
    header, row = table(recipe("models=lrn", "optimization.max_update=1", "model.encoder_hidden_size=8"))
    assert header == ["unit", "parameters", "train EM", "train F1", "valid EM", "valid F1", "s/batch"]
    assert len(row) == 7
    assert len(json.loads((tmp_path / "squad/runs/lrn/answers.json").read_text())) == 4
