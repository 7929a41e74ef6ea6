"""A corpus of one's own: two files in, a model, its BLEU and the command that translates out."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import ROOT, Recipe, assert_translates_natively, lines, load, runner, table, write
from sacrebleu import corpus_bleu

SHORT = """vocab_size=100 optimization.max_update=1 model.encoder_layers=1 model.decoder_layers=1
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
    found, right = (lines(recipe.work / name) for name in ("runs/lrn_tiny/average1.ja", "text/test.ja"))
    tokenizer = "ja-mecab" if "tok:ja-mecab" in recipe.output else "char"
    assert f"lrn_tiny: BLEU|nrefs:1|case:mixed|eff:no|tok:{tokenizer}" in recipe.output
    assert float(row[2]) == pytest.approx(corpus_bleu(found, [right], tokenize=tokenizer).score, abs=0.051)


def test_it_translates_natively(recipe):
    assert_translates_natively(recipe.work, "runs/lrn_tiny/checkpoint_average1.pt")


def test_the_epochs_that_there_are_are_averaged(recipe):
    assert "average is 5, but lrn_tiny has 1 whole epochs: their mean translates" in recipe.output
    single, mean = (
        torch.load(recipe.work / f"runs/lrn_tiny/checkpoint{name}.pt", weights_only=True)["model"]
        for name in ("1", "_average1")
    )
    assert all(torch.equal(single[key], mean[key]) for key in single)


def test_the_printed_command_translates_a_file(recipe, tmp_path):
    """It prints a line for each, also for an empty one, in their order, in any folder, from any folder."""
    *_, command = recipe.output.rstrip("\n").split("\n")
    shown = re.sub(r" bin .* 2>", " bin ... 2>", command.replace(str(recipe.work), "/ABSOLUTE/own"))
    assert f"    {shown}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    moved = tmp_path / "a work:folder"
    shutil.copytree(recipe.work, moved)
    command = command.replace(str(recipe.work), f"'{moved}'").replace("FILE", "new.en")
    sentences, right = (lines(recipe.work / name) for name in ("text/test.en", "runs/lrn_tiny/average1.ja"))
    write(tmp_path / "new.en", "".join(line + "\n" for line in ["", *sentences, *sentences[::-1]]))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split("\n")[1:-1] == [*right, *right[::-1]]


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
    assert "languages is not given, and no names of files end in two, but" in recipe.refused(*options)
    assert "--data new.en is not a folder" in recipe.refused("--data", "new.en")
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
        (["train=talk.en,nothing"], "train is talk.en,nothing, but there is no file nothing"),
        (["train=talk.en,talk.en"], "languages is not given, and no names of files end in two, but must be"),
        (["train=talk.en,talk.en", "languages=en-ja"], "train is talk.en,talk.en, but both names end in en"),
        (
            ["train=talk.en,talk.ja", "valid=talk.ja,few.ja"],
            "valid is talk.ja,few.ja, but both names end in ja",
        ),
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


@pytest.mark.parametrize(
    "options, right",
    [
        ("train=a.en,a.de", "train.en=a.en train.de=a.de"),
        ("train=a.en,a.de languages=de-en", "train.de=a.de train.en=a.en"),
        ("train=a.en,a.de valid=b.de,b.en test=c,b.en", "train.en=a.en train.de=a.de valid.en=b.en "
         "valid.de=b.de test.en=b.en test.de=c"),
        ("train=a.en,a.de.gz test=b.de,c", "train.en=a.en train.de=a.de.gz test.en=c test.de=b.de"),
        ("train=a.en.txt,a.de.txt valid=b.de.txt,b.en.txt", "train.en=a.en.txt train.de=a.de.txt "
         "valid.en=b.en.txt valid.de=b.de.txt"),
        ("train=a.en-de.en,a.en-de.de languages=de-en", "train.de=a.en-de.de train.en=a.en-de.en"),
        ("train=~/b.de,~/b.en languages=en-de", "train.en=~/b.en train.de=~/b.de"),
        ("train=a.pt_BR.txt,a.fr.txt", "train.pt_BR=a.pt_BR.txt train.fr=a.fr.txt"),
        ("train=c,d languages=en-de", "train.en=c train.de=d"),
        ("train=c,d", None),
        ("train=1.en.txt,2.en.txt", None),
        ("train=a.1.txt,a.2.txt", None),
    ],
)  # fmt: skip
def test_the_end_of_a_name_is_its_language(monkeypatch, tmp_path, options, right):
    """In whatever order the files are given; ~ is the home folder in both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in options.replace("=", ",").replace(" ", ",").split(","):
        write(Path(name.replace("~", str(tmp_path))), "")
    own = load("translation/own.py", monkeypatch)
    if right is None:
        with pytest.raises(runner.Refused, match=r"languages is .*, but must be two different ones, as"):
            own(options.split())
    else:
        found = {x: str(path) for x, path in own(options.split()).files().items()}
        assert found == dict(word.split("=") for word in right.replace("~", str(tmp_path)).split())
