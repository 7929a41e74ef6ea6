"""examples/ner: tags turned into IOBES; the recipe on a slice, of the real data in $CONLL2003, else made."""

import gzip
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest
from recipes import EXAMPLES, Recipe, assert_trains_the_same, lines, table, times, write
from seqeval.metrics.sequence_labeling import get_entities

FILES = {"eng.train": 300, "eng.testa": 21, "eng.testb": 23}  # 8 divides no count of results
SMALL = """model.encoder_embed_dim=20 model.encoder_hidden_size=20 model.char_embed_dim=10 model.dropout=0.1
    optimization.lr=0.02 lr_scheduler.warmup_updates=1 dataset.batch_size=8 models=lrn
    optimization.max_update=150""".split()
OPTIONS = """--encoder-embed-dim 20 --encoder-hidden-size 20 --char-embed-dim 10 --dropout 0.1 --lr 0.02
    --warmup-updates 1 --batch-size 8 --max-update 150 --total-num-update 150""".split()

sys.path.insert(0, str(EXAMPLES))
spec = importlib.util.spec_from_file_location("conll2003", EXAMPLES / "ner/conll2003.py")
conll2003 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conll2003)


def to_iobes(tags, prefixes="BI"):
    words = [(conll2003.Line(Path("file"), i, ""), "word", tag) for i, tag in enumerate(tags, 1)]
    assert set(conll2003.scheme(words)) <= set(prefixes) or not tags
    return conll2003.to_iobes(words, prefixes)


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
    assert " ".join(to_iobes(iob1.split())) == iobes


def test_every_short_sequence_keeps_its_entities():
    """seqeval's entities before and after, of all sequences of up to five tags."""
    kinds = ["O", "I-PER", "B-PER", "I-LOC", "B-LOC"]
    for length in range(1, 6):
        for tags in map(list, itertools.product(kinds, repeat=length)):
            assert get_entities(to_iobes(tags)) == get_entities(tags)


@pytest.mark.parametrize("prefixes", ["BIES", "BILU"])
def test_other_schemes_are_read_right_or_refused(prefixes):
    """Of all sequences of up to three tags, only those of well-formed entities come out, as IOBES."""
    ends = dict(zip(prefixes, "BIES"))
    kinds = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "LOC"))]
    read = 0
    for length in range(1, 4):
        right = set()
        for count in range(1, length + 1):
            for entities in itertools.product([1, 2, 3, 0], ["PER", "LOC"], repeat=count):
                tags = []
                for size, kind in zip(entities[::2], entities[1::2]):
                    inner = [prefixes[3]]
                    if size > 1:
                        inner = [prefixes[0], *prefixes[1] * (size - 2), prefixes[2]]
                    tags += [f"{prefix}-{kind}" for prefix in inner] if size else ["O"]
                if len(tags) == length:
                    right.add(tuple(tags))
        for tags in itertools.product(kinds, repeat=length):
            try:
                found = to_iobes(tags, prefixes)
            except conll2003.Refused as error:
                assert tags not in right and "file, line " in str(error)
            else:
                assert tags in right
                assert found == [tag if tag == "O" else ends[tag[0]] + tag[1:] for tag in tags]
                read += 1
    assert read > 50


@pytest.mark.parametrize(
    "tags, words",
    [
        (
            "B-PER M-PER E-PER",
            "line 2: the tag M-PER makes the prefixes B, M, which are not those of IOB1, IOB2",
        ),
        ("E-PER L-PER", "line 2: the tag L-PER makes the prefixes E, L, which are not"),
        ("B-PER PER", "line 2: the tag PER is not O or a prefix, a hyphen and a type"),
        ("B_PER", "line 1: the tag B_PER is not O or a prefix, a hyphen and a type"),
        ("b-PER", "line 1: the tag b-PER makes the prefixes b, which are not"),
        ("B-", "line 1: the tag B- is not O or"),
        ("o", "line 1: the tag o is not O or"),
    ],
)
def test_other_prefixes_are_refused(tags, words):
    with pytest.raises(conll2003.Refused) as error:
        to_iobes(tags.split())
    assert words in str(error.value)


def sentences(text):
    rows = [conll2003.Line(Path("file"), i, line) for i, line in enumerate(text.split("\n"), 1)]
    return [[word[1:] for word in sentence] for sentence in conll2003.sentences(rows, set())]


def test_reading_four_columns():
    text = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects\tVBZ\tI-VP\tO


-DOCSTART-

Peter\u00a0K. NNP I-NP I-PER
\t
10\u2028000\rx NNP I-NP O"""
    assert sentences(text) == [
        [("EU", "I-ORG"), ("rejects", "O")],
        [("Peter_K.", "I-PER")],
        [("10_000_x", "O")],
    ]
    for wrong in ("a b c", "a b c d e"):
        with pytest.raises(conll2003.Refused, match=r"file, line 3: there are \d columns, but must be 4"):
            sentences("a b c O\n\n" + wrong)
    with pytest.raises(conll2003.Refused, match="file, line 1: there are 1 columns, but must be 2"):
        sentences("a")
    for blank in "\u00a0\u0085\u2028\r\v":
        with pytest.raises(conll2003.Refused, match=r"file, line 2: the tag 'I-.*PER' has a blank in it"):
            sentences(f"a O\nb I-{blank}PER")


def real(name):
    path = Path(os.environ["CONLL2003"]) / name
    found = list(conll2003.sentences(conll2003.lines(path if path.exists() else Path(f"{path}.gz")), set()))
    return [([word for _, word, _ in sentence], [tag for *_, tag in sentence]) for sentence in found]


def made(name):
    """Words and IOB1 tags."""
    kinds, names = ["PER", "LOC", "ORG", "MISC"], ["Alma", "Bern", "Cobol", "Delft", "Ems"]
    found = []
    for i in range(FILES[name]):
        words, tags = ["Today"], ["O"]
        for n, kind in enumerate(kinds[i % 4 :] + kinds[: i % 4]):
            size = 1 + (i + n) % 3
            words += [names[(i + n + j) % 5] for j in range(size)] + ["saw"]
            tags += [f"I-{kind}"] * size + ["O"]
        found.append((words, tags))
    return found


@pytest.mark.skipif("CONLL2003" not in os.environ, reason="needs the data")
@pytest.mark.parametrize("name, count", [("eng.train", 14041), ("eng.testa", 3250), ("eng.testb", 3453)])
def test_the_real_data_keeps_its_entities(name, count):
    found = real(name)
    assert len(found) == count
    for _, tags in found:
        assert get_entities(to_iobes(tags)) == get_entities(tags)


def data(folder, change=None):
    """A folder as conll2003.py takes it, its training text compressed, with no tag that training lacks."""
    source = real if "CONLL2003" in os.environ else made
    known = {tag for _, tags in source("eng.train")[: FILES["eng.train"]] for tag in to_iobes(tags)}
    for name, size in FILES.items():
        taken = [pair for pair in source(name) if known.issuperset(to_iobes(pair[1]))][:size]
        assert len(taken) == size
        text = "-DOCSTART- -X- O O\n\n"
        for words, tags in taken:
            tags = change(tags) if change else tags
            text += "".join(f"{word} X X {tag}\n" for word, tag in zip(words, tags)) + "\n"
        if name == "eng.train":
            write(folder / f"{name}.gz", gzip.compress(text.encode()))
        else:
            write(folder / name, text)
    return folder


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("ner")
    data(cwd / "data")
    recipe = Recipe(start, cwd, "ner/conll2003.py", "--data", "data", *SMALL)
    recipe.work = cwd / "conll2003"
    recipe.output = recipe()
    return recipe


def test_the_table_has_a_row_a_unit(recipe):
    header, row = table(recipe.output)
    assert len(row) == len(header) == 5
    assert row[0] == "lrn" and int(row[1].replace(",", "")) > 1000
    assert all(0 < float(score) <= 100 for score in row[2:4]) and float(row[4]) > 0
    report = (recipe.work / "runs/lrn/test.score").read_text()
    assert "micro avg" in report


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    assert_trains_the_same(run, recipe.work, "lrn", tmp_path, *OPTIONS)


def test_every_word_of_every_sentence_is_tagged(recipe):
    text = [lines(recipe.work / f"text/test.{name}") for name in ("words", "tags")]
    assert len(text[0]) == FILES["eng.testb"]
    assert [len(line.split()) for line in text[0]] == [len(line.split()) for line in text[1]]


def test_a_second_run_repeats_the_table_only(recipe):
    before = times(recipe.work)
    assert table(recipe()) == table(recipe.output)
    assert times(recipe.work) == before


@pytest.mark.parametrize("prefixes", ["BIIB", "BIES", "BILU"], ids=["IOB2", "IOBES", "BILOU"])
def test_the_same_data_in_other_schemes_are_the_same(recipe, tmp_path, prefixes):
    """What the text step makes of them is what it made before, so that the trained run stands."""
    names = dict(zip("BIES", prefixes))
    data(tmp_path, lambda tags: [tag if tag == "O" else names[tag[0]] + tag[1:] for tag in to_iobes(tags)])
    output = recipe("--data", str(tmp_path))
    assert "== text\n" in output and "runs/lrn/train: done before" in output
    assert table(output) == table(recipe.output)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a X X I-PER\nb X X\n", "eng.testa, line 2: there are 3 columns, but must be 4"),
        ("a X X I-PER\n\nb X X X O\n", "eng.testa, line 3: there are 5 columns, but must be 4"),
        ("a X X M-PER\n", "eng.testa, line 1: the tag M-PER makes the prefixes"),
        ("a X X O\nb X X I-NEW\n", "eng.testa, line 2: the tag S-NEW (in IOBES) is not in the training set"),
        ("\n\n", "eng.testa has no sentences"),
    ],
)
def test_text_that_is_wrong_is_refused(recipe, tmp_path, text, words):
    write(data(tmp_path) / "eng.testa", text)
    message = recipe.refused("--data", str(tmp_path), "--work", str(tmp_path / "work"))
    assert f"{tmp_path}/{words}" in message


def test_a_lost_sentence_and_another_f1_are_errors():
    right = [["B-PER", "E-PER"], ["O"]]
    _, f1 = conll2003.entities_report(right, {0: ["B-PER", "E-PER"], 1: ["O"]})
    assert f1 == "100.00"
    with pytest.raises(conll2003.Refused, match="there are 0 tags for sentence 2 of the test, which has 1"):
        conll2003.entities_report(right, {0: ["O", "O"]})


def test_missing_folder_and_file(start, tmp_path):
    recipe = Recipe(start, tmp_path, "ner/conll2003.py")
    assert "give --data, the folder with eng.train, eng.testa, eng.testb" in recipe.refused()
    assert "neither eng.train nor eng.train.gz in ." in recipe.refused("--data", ".", "--work", "work")
