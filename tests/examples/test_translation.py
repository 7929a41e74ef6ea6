"""The translation recipes on a slice: of the real data in $MULTI30K, else of sentences made here."""

import gzip
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

import fairseq_lrn.models  # noqa: F401  registers lrn

RECIPES = Path(__file__).resolve().parents[2] / "examples/translation"
SIZES = {"train": 90, "val": 10, "test_2016_flickr": 11}  # 8 divides no count of results


def read(folder, name):
    plain = Path(folder) / name
    if plain.exists():
        return plain.read_text(encoding="utf-8").split("\n")
    return gzip.decompress((Path(folder) / f"{name}.gz").read_bytes()).decode("utf-8").split("\n")


def made():
    subjects = [
        ("A man", "Ein Mann"),
        ("A woman", "Eine Frau"),
        ("A child", "Ein Kind"),
        ("A dog", "Ein Hund"),
    ]
    verbs = [("walks", "läuft"), ("sleeps", "schläft"), ("stands", "steht"), ("waits", "wartet")]
    places = [
        ("in the park", "im Park"),
        ("on the street", "auf der Straße"),
        ("by the lake", "am See"),
        ("in the house", "im Haus"),
        ("under a tree", "unter einem Baum"),
        ("at the station", "am Bahnhof"),
        ("in the snow", "im Schnee"),
    ]
    pairs = [zip(*words) for words in itertools.product(subjects, verbs, places)]
    return [tuple(" ".join(side) + "." for side in pair) for pair in pairs]


def execute(script, *words, cwd, **settings):
    """Run a recipe in the folder ``cwd``, writing to work/ there; one update is one epoch."""
    env = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "WORK": "work",
        "VOCAB_SIZE": "300" if "MULTI30K" in os.environ else "100",
        "MAX_UPDATE": "3",
        "AVERAGE": "0",
        **settings,
    }
    return subprocess.run(
        ["bash", str(RECIPES / script), *words], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as MULTI30K takes it, its training text compressed, the rest not."""
    folder = tmp_path_factory.mktemp("data")
    sentences = made()
    for name, size in SIZES.items():
        taken, sentences = sentences[:size], sentences[size:]
        for side, lang in enumerate(["en", "de"]):
            if "MULTI30K" in os.environ:
                lines = read(os.environ["MULTI30K"], f"{name}.{lang}")[:size]
            else:
                lines = [pair[side] for pair in taken]
            assert len(lines) == size
            text = "".join(line + "\n" for line in lines).encode("utf-8")
            if name == "train":
                (folder / f"{name}.{lang}.gz").write_bytes(gzip.compress(text))
            else:
                (folder / f"{name}.{lang}").write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    """Run multi30k.sh in a folder of its own."""
    cwd = tmp_path_factory.mktemp("cwd")

    def run(*words, **settings):
        return execute("multi30k.sh", *words, cwd=cwd, **{"MULTI30K": str(data), **settings})

    run.work = cwd / "work"
    return run


SHORT = ["--max-tokens", "20000", "--max-target-positions", "100"]
AVERAGED = {"AVERAGE": "2"}


def lines(path):
    return path.read_bytes().count(b"\n")


@pytest.fixture(scope="module")
def transformer(recipe):
    return recipe("transformer", *SHORT)


@pytest.fixture(scope="module")
def lrn(recipe):
    return recipe("lrn_tiny", *SHORT, **AVERAGED)


@pytest.mark.parametrize("arch, name", [("transformer", "best"), ("lrn_tiny", "average2")])
def test_as_many_translations_as_sentences(recipe, transformer, lrn, arch, name):
    done = {"transformer": transformer, "lrn_tiny": lrn}[arch]
    assert done.returncode == 0, done.stderr[-4000:]
    assert lines(recipe.work / "raw" / "test.en") == SIZES["test_2016_flickr"]
    assert lines(recipe.work / arch / f"{name}.de") == SIZES["test_2016_flickr"]
    assert "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in done.stdout
    assert "chrF2|nrefs:1|case:mixed|" in done.stdout


def test_a_second_run_repeats_the_scores_only(recipe, lrn):
    files = [
        path for folder in ("lrn_tiny", "bin", "bpe", "raw") for path in (recipe.work / folder).iterdir()
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = recipe("lrn_tiny", *SHORT, **AVERAGED)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again.stdout.splitlines() == lrn.stdout.splitlines()[-2:]


def test_a_lost_translation_is_an_error(recipe, transformer):
    source = recipe.work / "raw" / "test.en"
    text = source.read_bytes()
    source.write_bytes(text + b"One more.\n")
    try:
        done = recipe("transformer", *SHORT)
    finally:
        source.write_bytes(text)
    assert done.returncode != 0
    assert "11 translations of 12 sentences" in done.stderr
    assert "failed in step: scoring" in done.stderr


def test_average_is_the_mean_of_the_last_epochs(recipe, lrn):
    def load(name):
        return torch.load(recipe.work / "lrn_tiny" / f"checkpoint{name}.pt", weights_only=True)["model"]

    first, second, third, average = load(1), load(2), load(3), load("_average2")
    assert average.keys() == third.keys()
    for key in average:
        torch.testing.assert_close(average[key], (second[key] + third[key]) / 2)
    key = "decoder.embed_tokens.weight"
    assert not torch.allclose(average[key], third[key], rtol=0, atol=1e-8)
    assert not torch.allclose(average[key], (first[key] + second[key] + third[key]) / 3, rtol=0, atol=1e-8)


def test_average_of_more_epochs_than_there_are(recipe, lrn):
    done = recipe("lrn_tiny", *SHORT, AVERAGE="9")
    assert done.returncode != 0
    assert "count is 9, and work/lrn_tiny holds 3 epoch checkpoints" in done.stderr
    assert "failed in step: averaging 9 checkpoints" in done.stderr


def test_compare_prints_a_table(recipe, transformer):
    done = recipe("compare", "transformer", ROUNDS="1", SPEED_UPDATES="4")
    assert done.returncode == 0, done.stderr[-4000:]
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    assert len(header) == len(row) == 6
    assert row[0] == "transformer"
    assert int(row[1].replace(",", "")) > 1_000_000
    assert all(0 <= float(score) <= 100 for score in row[2:4])
    assert all(float(speed) > 0 for speed in row[4:])


def test_compare_needs_a_trained_model(recipe):
    done = recipe("compare", "lrn_wmt_en_de")
    assert done.returncode != 0
    assert "train and translate with RUN=lrn_wmt_en_de first" in done.stderr


def test_missing_folder(recipe, tmp_path):
    done = recipe("lrn_tiny", MULTI30K=str(tmp_path / "nowhere"), WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert f"MULTI30K={tmp_path}/nowhere is not a folder" in done.stderr
    assert "failed in step: raw text" in done.stderr


def test_missing_file(recipe, tmp_path):
    done = recipe("lrn_tiny", MULTI30K=str(tmp_path), WORK=str(tmp_path / "work"))
    assert done.returncode != 0
    assert f"neither train.en nor train.en.gz in MULTI30K={tmp_path}" in done.stderr


def test_no_architecture(recipe):
    done = recipe()
    assert done.returncode != 0
    assert "usage:" in done.stderr


SOURCE = {"iwslt14": "de", "wmt14": "en"}
TARGET = {"iwslt14": "en", "wmt14": "de"}
ONE_LAYER = ["--encoder-layers", "1", "--decoder-layers", "1"]
UNEVEN = {"en": "Yes.", "de": "Ja, das ist nun aber wirklich ganz und gar nicht dasselbe."}


def text(lang):
    """Sentences to train on (70), the last pair being of uneven lengths, to validate (3) and to test (15)."""
    if "MULTI30K" in os.environ:
        sentences = read(os.environ["MULTI30K"], f"train.{lang}")
    else:
        sentences = [pair[lang == "de"] for pair in made()]
    return [*sentences[:69], UNEVEN[lang]], sentences[69:72], sentences[72:87]


def iwslt14(lang):
    train, valid, test = text(lang)
    for i, sentence in enumerate(valid, 1):
        train.insert(23 * i - 1, sentence)
    talks = [
        "<url>http://www.ted.com/</url>",
        "<keywords>talks</keywords>",
        "<talkid>1</talkid>",
        f"<title>{train[0]}</title>",
        f"<description>{train[1]}</description>",
        *(f" {sentence} " for sentence in train[2:]),
    ]
    files = {f"train.tags.de-en.{lang}": talks}
    for i, name in enumerate(["TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"]):
        segments = [
            f'<seg id="{n}"> {sentence} </seg>' for n, sentence in enumerate(test[3 * i : 3 * i + 3], 1)
        ]
        files[f"IWSLT14.{name}.de-en.{lang}.xml"] = [f"<title>{name}</title>", *segments]
    return files


def wmt14(lang):
    train, valid, test = text(lang)
    files = {f"newstest2013.{lang}": valid, f"newstest2014.{lang}": test}
    for i, name in enumerate(["europarl-v7", "commoncrawl", "news-commentary-v9"]):
        files[f"{name}.de-en.{lang}"] = train[30 * i : 30 * i + 30]
    return files


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module", params=[iwslt14, wmt14], ids=["iwslt14", "wmt14"])
def published(request, tmp_path_factory):
    """A recipe's name and the folder with its text, in local/, and what it made of that, in work/."""
    name = request.param.__name__
    folder = tmp_path_factory.mktemp(name)
    for lang in ("en", "de"):
        for file, sentences in request.param(lang).items():
            write(folder / "local" / file, sentences)
    model = {"iwslt14": ["lrn_tiny"], "wmt14": ["deepnmt_tiny", "--update-freq", "1"]}[name]
    settings = {name.upper(): "local", "RUN": "run", "MAX_UPDATE": "1"}
    done = execute(f"{name}.sh", *model, *ONE_LAYER, *SHORT, cwd=folder, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return name, folder, done.stdout


def test_published_recipe(published):
    name, folder, output = published
    source, target = SOURCE[name], TARGET[name]
    for lang in ("en", "de"):
        for split, sentences in zip(("train", "valid", "test"), text(lang)):
            file = folder / "work" / "raw" / f"{split}.{lang}"
            assert file.read_text(encoding="utf-8").split("\n")[:-1] == sentences
    pairs = [lines(folder / "work" / "bpe" / f"train.{lang}") for lang in (source, target)]
    assert 35 < pairs[0] == pairs[1] < 70

    run = folder / "work" / "run"
    assert lines(run / f"best.{target}") == 15
    searched = {"iwslt14": ["'beam': 5", "'lenpen': 1"], "wmt14": ["'beam': 4", "'lenpen': 0.6"]}[name]
    log = (run / "best.generate.log").read_text()
    assert all(option in log for option in searched)
    assert " .\n" in (run / f"reference.tok.{target}").read_text(encoding="utf-8")
    assert "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in output
    assert "chrF2|nrefs:1|case:mixed|" in output
    assert "BLEU|nrefs:1|case:lc|eff:no|tok:none|" in output


def execute_with_archives(script, folder, **settings):
    """Run a recipe as far as its text, with a curl that takes archives from ``folder``."""
    curl = folder / "bin" / "curl"
    write(curl, ["#!/bin/bash", 'while [[ $1 != -o ]]; do shift; done; cp "$ARCHIVES/${3##*/}" "$2"'])
    curl.chmod(0o755)
    path = os.pathsep.join([str(curl.parent), os.environ["PATH"]])
    return execute(script, "lrn", cwd=folder, ARCHIVES=str(folder), PATH=path, VOCAB_SIZE="1", **settings)


def test_fetched_multi30k_is_the_same(recipe, lrn, data, tmp_path):
    for file in data.iterdir():
        compressed = file.read_bytes() if file.suffix == ".gz" else gzip.compress(file.read_bytes())
        (tmp_path / f"{file.name.replace('.gz', '')}.gz").write_bytes(compressed)
    execute_with_archives("multi30k.sh", tmp_path, MULTI30K="")
    for file in (recipe.work / "raw").iterdir():
        assert file.read_bytes() == (tmp_path / "work" / "raw" / file.name).read_bytes()


ARCHIVES = {
    "iwslt14": [("de-en", "de-en/", "*")],
    "wmt14": [
        ("training-parallel-europarl-v7", "training/", "europarl-v7.*"),
        ("training-parallel-commoncrawl", "", "commoncrawl.*"),
        ("training-parallel-nc-v9", "training/", "news-commentary-v9.*"),
    ],
}


def test_fetched_text_is_the_same(published, tmp_path):
    """With a curl that has the archives, and sacreBLEU's test sets fetched before."""
    name, folder, _ = published
    for archive, prefix, files in ARCHIVES[name]:
        with tarfile.open(tmp_path / f"{archive}.tgz", "w:gz") as tar:
            for path in (folder / "local").glob(files):
                tar.add(path, prefix + path.name)
    for path in (folder / "local").glob("newstest*"):
        known = {"newstest2013": "wmt13", "newstest2014": "wmt14/full"}[path.stem]
        (tmp_path / known).mkdir(parents=True, exist_ok=True)
        for field in {".en": ["src"], ".de": ["ref", "docid", "genre", "origlang"]}[path.suffix]:
            shutil.copy(path, tmp_path / known / f"{known.replace('/', '_')}.en-de.{field}")
    done = execute_with_archives(f"{name}.sh", tmp_path, SACREBLEU=str(tmp_path), **{name.upper(): ""})
    assert "failed in step: sentencepiece" in done.stderr
    for file in (folder / "work" / "raw").iterdir():
        assert file.read_bytes() == (tmp_path / "work" / "raw" / file.name).read_bytes()
    assert not (tmp_path / "work" / "download").exists()


def test_sacremoses_is_asked_for_at_once(tmp_path):
    done = execute("iwslt14.sh", "lrn", cwd=tmp_path, PATH=os.defpath)
    assert done.returncode != 0
    assert "no command sacremoses: pip install sacremoses" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name, arch", [("iwslt14", "lrn_iwslt_de_en"), ("wmt14", "lrn_wmt_en_de")])
def test_yaml_and_script_train_the_same(name, arch):
    functions = 'sed -n -e "/^[a-z_]*train() {/,/^}/p" -e "/^dataset=/p" -e "/^max_update=/p" recipe.sh "$1"'
    script = (
        'fairseq-train() { printf "%s\\n" "$@"; }; '
        f'cd "$0"; eval "$({functions})"; train checkpoints "${{@:2}}"'
    )
    env = {**os.environ, "work": "", "user_dir": str(RECIPES.parents[1] / "fairseq_lrn")}
    words = subprocess.run(
        ["bash", "-c", script, str(RECIPES), f"{name}.sh", arch],
        env=env, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    said = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))

    written = OmegaConf.load(RECIPES / "config" / f"{name}.yaml")
    written.common.user_dir, written.task.data = env["user_dir"], words[0]
    add_defaults(written)
    groups = [group for group in written if group != "hydra"]
    for group in groups:
        if group not in ("task", "model", "criterion", "optimizer", "lr_scheduler"):
            default = OmegaConf.structured(FairseqConfig.__dataclass_fields__[group].default)
            written[group] = OmegaConf.merge(default, written[group])
    written.model._name = arch
    written, said = (
        OmegaConf.to_container(config, resolve=True, enum_to_str=True) for config in (written, said)
    )
    for group in groups:
        given = vars(said[group]) if hasattr(said[group], "__dict__") else said[group]
        assert {name: written[group][name] for name in given} == given, group


def bpe(folder, *limits):
    command = [sys.executable, str(RECIPES / "bpe.py"), str(folder), str(folder / "bpe"), "100", *limits]
    return subprocess.run(command, capture_output=True, text=True)


def test_uneven_empty_and_long_pairs_are_left_out(tmp_path):
    train = made()[:90]
    bad = [
        ("", "Ein Hund."),
        ("A dog.", ""),
        ("A dog. " * 40, "Ein Hund. " * 40),
        tuple(UNEVEN[x] for x in ("en", "de")),
    ]
    for split, pairs in {"train": [*bad[:2], *train, *bad[2:]], "valid": bad, "test": bad}.items():
        for side, lang in enumerate(("en", "de")):
            write(tmp_path / f"{split}.{lang}", [pair[side] for pair in pairs])
    done = bpe(tmp_path, "60", "3")
    assert "train: 90 of 94 pairs" in done.stderr
    for lang in ("en", "de"):
        assert lines(tmp_path / "bpe" / f"train.{lang}") == 90
        assert lines(tmp_path / "bpe" / f"test.{lang}") == 4
    whole = bpe(tmp_path)
    assert "train: 94 of 94 pairs" in whole.stderr


def test_sides_of_different_length(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.en", [pair[0] for pair in made()])
        write(tmp_path / f"{split}.de", [pair[1] for pair in made()][: 100 if split == "valid" else None])
    done = bpe(tmp_path)
    assert done.returncode != 0
    assert "valid.de ends after line 100" in done.stderr
