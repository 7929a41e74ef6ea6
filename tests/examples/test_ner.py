"""examples/ner: tags turned into IOBES; the recipe on a slice, of the real data in $CONLL2003, else made."""

import gzip
import importlib.util
import itertools
import os
import subprocess
from pathlib import Path

import pytest
from recipes import Recipe
from seqeval.metrics.sequence_labeling import get_entities

FOLDER = Path(__file__).resolve().parents[2] / "examples/ner"
FILES = {"eng.train": 300, "eng.testa": 21, "eng.testb": 23}  # 8 divides no count of results
SMALL = (
    "--encoder-embed-dim 20 --encoder-hidden-size 20 --char-embed-dim 10 --dropout 0.1 --lr 0.02 "
    "--warmup-updates 1 --batch-size 8"
).split()

spec = importlib.util.spec_from_file_location("conll", FOLDER / "conll.py")
conll = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conll)


@pytest.mark.parametrize(
    "iob1, iobes",
    [
        ("", ""),
        ("O O", "O O"),
        ("I-PER", "S-PER"),
        ("O I-PER I-PER O", "O B-PER E-PER O"),
        ("I-ORG I-ORG I-ORG", "B-ORG I-ORG E-ORG"),
        ("I-PER I-LOC", "S-PER S-LOC"),
        ("I-LOC I-LOC I-PER I-PER", "B-LOC E-LOC B-PER E-PER"),
        ("I-PER B-PER", "S-PER S-PER"),
        ("I-PER I-PER B-PER I-PER I-PER", "B-PER E-PER B-PER I-PER E-PER"),
        ("I-LOC B-LOC B-LOC I-LOC O", "S-LOC S-LOC B-LOC E-LOC O"),
        ("O B-MISC I-MISC O", "O B-MISC E-MISC O"),
        ("I-PER O I-PER", "S-PER O S-PER"),
    ],
)
def test_iob1_to_iobes(iob1, iobes):
    assert " ".join(conll.to_iobes(iob1.split())) == iobes


def test_every_short_sequence_keeps_its_entities():
    """seqeval's entities before and after, of all sequences of up to five tags."""
    kinds = ["O", "I-PER", "B-PER", "I-LOC", "B-LOC"]
    for length in range(1, 6):
        for tags in map(list, itertools.product(kinds, repeat=length)):
            assert get_entities(conll.to_iobes(tags)) == get_entities(tags)


def test_reading_four_columns():
    text = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O


-DOCSTART- -X- O O

Peter NNP I-NP I-PER"""
    assert list(conll.read(text.splitlines())) == [
        (["EU", "rejects"], ["I-ORG", "O"]),
        (["Peter"], ["I-PER"]),
    ]


def sentences(name):
    """Of the real file, or made: words and IOB1 tags."""
    if "CONLL2003" in os.environ:
        path = Path(os.environ["CONLL2003"]) / name
        text = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        return list(conll.read(text.decode("utf-8").splitlines()))
    kinds, names = ["PER", "LOC", "ORG", "MISC"], ["Alma", "Bern", "Cobol", "Delft", "Ems"]
    made = []
    for i in range(FILES[name]):
        words, tags = ["Today"], ["O"]
        for n, kind in enumerate(kinds[i % 4 :] + kinds[: i % 4]):
            size = 1 + (i + n) % 3
            words += [names[(i + n + j) % 5] for j in range(size)] + ["saw"]
            tags += [f"I-{kind}"] * size + ["O"]
        made.append((words, tags))
    return made


@pytest.mark.skipif("CONLL2003" not in os.environ, reason="needs the data")
@pytest.mark.parametrize("name, count", [("eng.train", 14041), ("eng.testa", 3250), ("eng.testb", 3453)])
def test_the_real_data_keeps_its_entities(name, count):
    found = sentences(name)
    assert len(found) == count
    for _, tags in found:
        assert get_entities(conll.to_iobes(tags)) == get_entities(tags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as CONLL2003 takes it, its training text compressed, with no tag that training lacks."""
    folder = tmp_path_factory.mktemp("data")
    known = {tag for _, tags in sentences("eng.train")[: FILES["eng.train"]] for tag in conll.to_iobes(tags)}
    for name, size in FILES.items():
        taken = [pair for pair in sentences(name) if known.issuperset(conll.to_iobes(pair[1]))][:size]
        assert len(taken) == size
        text = "-DOCSTART- -X- O O\n\n"
        for words, tags in taken:
            text += "".join(f"{word} X X {tag}\n" for word, tag in zip(words, tags)) + "\n"
        if name == "eng.train":
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    return Recipe("ner", tmp_path_factory.mktemp("cwd"), CONLL2003=str(data), MAX_UPDATE="150")


@pytest.fixture(scope="module")
def done(recipe):
    return recipe("conll2003.sh", "lrn", "--", *SMALL)


def test_the_table_has_a_row_a_unit(done):
    assert done.returncode == 0, done.stderr[-4000:]
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    assert len(row) == len(header) == 5
    assert row[0] == "lrn"
    assert int(row[1].replace(",", "")) > 1000
    assert all(0 < float(score) <= 100 for score in row[2:4])
    assert float(row[4]) > 0


def test_every_word_of_every_sentence_is_tagged(recipe, done):
    text = [
        (recipe.work / "text" / f"test.{name}").read_text("utf-8").splitlines() for name in ("words", "tags")
    ]
    assert len(text[0]) == FILES["eng.testb"]
    assert [len(line.split()) for line in text[0]] == [len(line.split()) for line in text[1]]


def test_a_second_run_repeats_the_table_only(recipe, done):
    before = {path: path.stat().st_mtime_ns for path in recipe.work.rglob("*") if path.is_file()}
    again = recipe("conll2003.sh", "lrn", "--", *SMALL)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in recipe.work.rglob("*") if path.is_file()} == before
    assert again.stdout == done.stdout


def test_another_f1_than_seqevals_is_an_error(recipe, done):
    score = recipe.work / "lrn" / "test.score"
    text = score.read_text()
    score.write_text(text + "12.34\n")
    try:
        again = recipe("conll2003.sh", "lrn", "--", *SMALL)
    finally:
        score.write_text(text)
    assert again.returncode != 0
    assert "seqeval of the generated tags 12.34" in again.stderr
    assert "failed in step: scores of lrn" in again.stderr


def test_a_lost_sentence_is_an_error(recipe, done):
    score, generated = (recipe.work / "lrn" / f"test.{name}" for name in ("score", "generate"))
    lines = [line for line in generated.read_text("utf-8").splitlines() if not line.startswith("D-7\t")]
    (recipe.work / "cut").write_text("\n".join(lines), "utf-8")
    command = [
        "python",
        str(FOLDER / "score.py"),
        str(recipe.work / "text" / "test.tags"),
        str(recipe.work / "cut"),
    ]
    lost = subprocess.run(command, capture_output=True, text=True)
    assert lost.returncode != 0
    assert "has 0 tags for line 8" in lost.stderr
    command[-1] = str(generated)
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert whole.stdout == score.read_text()


def test_missing_folder_and_file(recipe, tmp_path):
    for folder, words in (
        ("", "must name the folder"),
        (str(tmp_path), "neither eng.train nor eng.train.gz"),
    ):
        failed = recipe("conll2003.sh", CONLL2003=folder, WORK=str(tmp_path / "work"))
        assert failed.returncode != 0
        assert words in failed.stderr
        assert "failed in step: words and tags" in failed.stderr
