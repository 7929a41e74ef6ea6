"""A corpus of one's own: two files in, a model, its BLEU and the command that translates out."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import ROOT, Recipe, assert_translates_natively, lines, table, write
from sacrebleu import corpus_bleu

SHORT = """vocab_size=100 average=0 optimization.max_update=1 model.encoder_layers=1 model.decoder_layers=1
    generation.max_len_b=20""".split()
PAIRS = [
    (f"{who} {verb} {what} {place}.", f"{what} {place} {who} {verb}!")
    for who in ("the cat", "my dog", "a bird")
    for verb in ("sees", "likes", "wants")
    for what in ("milk", "bread", "fish", "rain")
    for place in ("here", "there", "now")
]


def corpus(folder, pairs=PAIRS, name="talk", languages=("en", "ja")):
    for side, language in enumerate(languages):
        write(folder / f"{name}.{language}", "".join(pair[side] + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    """A run on two files."""
    cwd = tmp_path_factory.mktemp("own")
    corpus(cwd)
    recipe = Recipe(start, cwd, "translation/own.py", *SHORT)
    recipe.work = cwd / "own"
    recipe.output = recipe("train=talk.en,talk.ja")
    return recipe


def test_sentences_are_held_out(recipe):
    """One in twenty validates and tests each, wherever it is in the file, and no source is in two sets."""
    sets = {}
    for split in ("train", "valid", "test"):
        sides = (lines(recipe.work / f"text/{split}.{language}") for language in ("en", "ja"))
        sets[split] = list(zip(*sides))
    assert [len(pairs) for pairs in sets.values()] == [98, 5, 5]
    assert sorted(pair for pairs in sets.values() for pair in pairs) == sorted(PAIRS)
    assert sets["train"] == [pair for pair in PAIRS if pair in sets["train"]]


def test_the_same_sentences_are_held_out_of_more(recipe, tmp_path):
    held = {x: lines(recipe.work / f"text/{x}.en") for x in ("valid", "test")}
    corpus(tmp_path, [*reversed(PAIRS), *PAIRS, (PAIRS[0][0], "another")])
    options = [f"train={tmp_path}/talk.en,{tmp_path}/talk.ja", "vocab_size=9", "--work", "more"]
    assert "vocab_size is 9, but must be more than" in recipe.refused(*options)
    text = recipe.cwd / "more/text"
    for split, sentences in held.items():
        assert sorted(lines(text / f"{split}.en")) == sorted(sentences)
        assert not set(sentences) & set(lines(text / "train.en"))
    assert len(lines(text / "train.en")) >= 2 * 98


def test_bleu_and_its_signature(recipe):
    header, row = table(recipe.output)
    assert header == ["run", "parameters", "BLEU", "chrF"] and row[0] == "lrn_tiny"
    found, right = (lines(recipe.work / name) for name in ("runs/lrn_tiny/best.ja", "text/test.ja"))
    tokenizer = "ja-mecab" if "tok:ja-mecab" in recipe.output else "char"
    assert f"lrn_tiny: BLEU|nrefs:1|case:mixed|eff:no|tok:{tokenizer}" in recipe.output
    assert float(row[2]) == pytest.approx(corpus_bleu(found, [right], tokenize=tokenizer).score, abs=0.051)


def test_it_translates_natively(recipe):
    assert_translates_natively(recipe.work, "runs/lrn_tiny/checkpoint_best.pt")


def test_the_command_that_translates(recipe):
    *_, command = recipe.output.rstrip("\n").split("\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sentences = lines(recipe.work / "text/test.en")
    done = subprocess.run(
        ["bash", "-c", command],
        input="".join(line + "\n" for line in sentences),
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split("\n")[:-1] == lines(recipe.work / "runs/lrn_tiny/best.ja")


def test_three_pairs_of_files(recipe, tmp_path):
    """From a folder, compressed or not; what is in two sets is told, and empty sentences."""
    corpus(tmp_path, PAIRS[:90], "train", ("de", "fr"))
    for language in ("de", "fr"):
        path = tmp_path / f"train.{language}"
        write(tmp_path / f"train.{language}.gz", gzip.compress(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n"))
        path.unlink()
    corpus(tmp_path, PAIRS[80:95], "dev", ("de", "fr"))
    corpus(tmp_path, PAIRS[95:], "test", ("de", "fr"))
    options = ["--data", str(tmp_path), "--work", str(tmp_path / "work")]
    assert "languages is , but must be two different ones" in recipe.refused(*options)
    output = recipe(*options, "languages=fr-de")
    assert "valid: 10 of 15 sentences are in the training text, too" in output
    assert "train: 1 of 91 pairs have an empty side and are left out" in output
    assert "tok:13a" in output and "fairseq-preprocess -s fr -t de" in output
    assert lines(tmp_path / "work/text/test.fr") == [pair[1] for pair in PAIRS[95:]]
    (tmp_path / "test.fr").unlink()
    assert f"{tmp_path}/test.de exists, but not in the other" in recipe.refused(*options, "languages=de-fr")


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "give either train=FILE,FILE or --data DIR"),
        (["train=talk.en"], "train is talk.en, but must be two files"),
        (["train=talk.en,nothing"], "train is talk.en,nothing, but must be two files"),
        (["train=talk.en,talk.en"], "languages is en,en, but must be two different ones"),
        (["train=talk.en,talk.ja", "--data", "."], "give either train=FILE,FILE or --data DIR"),
        (["--data", ".", "languages=en-ja"], ". has no train.en and train.ja"),
        (
            ["train=few.en,few.ja"],
            "there are 19 different sentences to take valid from, but 20 different sentences",
        ),
        (["train=talk.en,talk.ja", "tokenizer=foo"], "tokenizer is foo, but must be none or zh or 13a or "),
        (["train=talk.en,talk.ja", "held_out=0"], "but held_out must be positive"),
        (["train=talk.en,talk.ja", "languages=e/n-ja"], "languages is e/n,ja, but must be"),
    ],
)
def test_what_is_not_two_files_is_refused(recipe, options, words):
    corpus(recipe.cwd, PAIRS[:19], "few")
    assert words in recipe.refused("--work", "new", *options)
