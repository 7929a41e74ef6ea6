"""The translation recipes on a slice: of the real data in $MULTI30K, else of sentences made here."""

import gzip
import importlib
import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from recipes import (
    EXAMPLES,
    Recipe,
    assert_trains_the_same,
    assert_translates_natively,
    lines,
    table,
    times,
    write,
)

SIZES = {"train": 90, "val": 10, "test_2016_flickr": 11}  # 8 divides no count of results
SHORT = "dataset.max_tokens=20000 generation.max_len_b=20 vocab_size=100 average=0".split()
ONE_LAYER = ["model.encoder_layers=1", "model.decoder_layers=1"]


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


def text(sentences):
    return "".join(sentence + "\n" for sentence in sentences)


def real(name, language):
    path = Path(os.environ["MULTI30K"], f"{name}.{language}")
    content = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    return content.decode("utf-8").split("\n")[:-1]


def multi30k(folder):
    """A folder as multi30k.py takes it, its training text compressed, the rest not."""
    sentences = made()
    for name, size in SIZES.items():
        taken, sentences = sentences[:size], sentences[size:]
        for side, language in enumerate(("en", "de")):
            chosen = (
                real(name, language)[:size] if "MULTI30K" in os.environ else [pair[side] for pair in taken]
            )
            content = text(chosen).encode("utf-8")
            compressed = name == "train"
            write(
                folder / f"{name}.{language}{'.gz' * compressed}",
                gzip.compress(content) if compressed else content,
            )
    return folder


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("multi30k")
    multi30k(cwd / "data")
    short = [*SHORT, "optimization.max_update=3"]  # each an epoch
    if "MULTI30K" in os.environ:
        short[2] = "vocab_size=300"
    recipe = Recipe(start, cwd, "translation/multi30k.py", "--data", "data", *short)
    recipe.work = cwd / "multi30k"
    recipe.lrn = recipe("average=2", *ONE_LAYER)
    return recipe


def test_as_many_translations_as_sentences(recipe):
    assert len(lines(recipe.work / "text/test.en")) == SIZES["test_2016_flickr"]
    assert len(lines(recipe.work / "runs/lrn_tiny/average2.de")) == SIZES["test_2016_flickr"]
    header, row = table(recipe.lrn)
    assert header == ["run", "parameters", "BLEU", "chrF"] and row[0] == "lrn_tiny"
    assert "lrn_tiny: BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in recipe.lrn
    assert "lrn_tiny: chrF2|nrefs:1|case:mixed|" in recipe.lrn


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    options = "--max-update 3 --max-tokens 20000 --encoder-layers 1 --decoder-layers 1".split()
    assert_trains_the_same(run, recipe.work, "lrn_tiny", tmp_path, *options)


def test_it_translates_natively(recipe):
    assert_translates_natively(recipe.work, "runs/lrn_tiny/checkpoint_average2.pt")


def test_a_second_run_repeats_the_table_only(recipe):
    before = times(recipe.work)
    again = recipe("average=2", *ONE_LAYER)
    assert times(recipe.work) == before
    assert again.split("\n| ", 1)[1] == recipe.lrn.split("\n| ", 1)[1]


def test_average_is_the_mean_of_the_last_epochs(recipe):
    def load(name):
        return torch.load(recipe.work / f"runs/lrn_tiny/checkpoint{name}.pt", weights_only=True)["model"]

    first, second, third, average = load(1), load(2), load(3), load("_average2")
    assert average.keys() == third.keys()
    for key in average:
        torch.testing.assert_close(average[key], (second[key] + third[key]) / 2)
    key = "decoder.embed_tokens.weight"
    assert not torch.allclose(average[key], third[key], rtol=0, atol=1e-8)
    assert not torch.allclose(average[key], (first[key] + second[key] + third[key]) / 3, rtol=0, atol=1e-8)


def test_curve(recipe):
    """Each epoch sees the same words, in one update. The best checkpoint is one of the epochs'."""
    curve = Recipe(recipe.begin, recipe.cwd, "efficiency/curve.py")
    printed = table(curve("multi30k", "en", "de", "lrn_tiny=100", "--json", "curve.json"))
    (points,) = json.loads((recipe.cwd / "curve.json").read_text()).values()
    assert [x["epoch"] for x in points] == [1, 2, 3]
    assert [[str(x["epoch"]), f"{x['bleu']:.1f}"] for x in points] == [row[1::2] for row in printed[1:]]
    count = sum(len(line.split()) + 1 for line in lines(recipe.work / "subwords/train.de"))
    for x in points:
        assert x["minutes"] == pytest.approx(x["epoch"] * count / 100 / 60, rel=1e-3)
    best = recipe("average=0", "generation.max_len_b=200", *ONE_LAYER)
    assert table(best)[1][2] in [f"{x['bleu']:.1f}" for x in points]


def test_words_of_a_training(tmp_path, monkeypatch):
    """It began anew once, was resumed in an epoch, and is so long that fairseq writes 1e+06."""
    monkeypatch.syspath_prepend(EXAMPLES / "efficiency")
    words = importlib.import_module("curve").words
    line = "[x][train][INFO] - epoch {:03d} | loss 2 | wpb {} | bsz 9 | num_updates {} | lr 1\n".format
    log = tmp_path / "train.log"
    log.write_text(line(1, 7, 900) + line(1, 10, 1000) + line(1, 10, 500000) + line(2, "1.2e+06", "1e+06"))
    assert words(log) == {1: 5e6, 2: 5e6 + 1.2e6 * 5e5}
    log.write_text('[x][train][INFO] - {"epoch": 1, "train_wpb": "10"}\n')
    with pytest.raises(SystemExit, match="no whole epoch, or another log_format than simple"):
        words(log)


def test_average_of_more_epochs_than_are_kept(recipe):
    for options, words in (
        (["average=11"], "average is 11, but checkpoint.keep_last_epochs is 10: give average=10"),
        (["average=2", "checkpoint.no_epoch_checkpoints=true"], "no_epoch_checkpoints keeps none: give aver"),
    ):
        assert words in recipe.refused("--work", "new", *options)
    assert not (recipe.cwd / "new").exists()


def test_side_by_side(recipe):
    """fairseq's Transformer and LSTM are trained too, the one in the form of lrn_tiny, and compared.

    Their settings do not matter to the timed trainings; of several translations the best is scored.
    """
    sizes = [
        f"model.{name}=8" for name in ("encoder_embed_dim", "decoder_embed_dim", "decoder_out_embed_dim")
    ]
    sizes += ["model.encoder_hidden_size=8", "model.decoder_hidden_size=8"]
    sizes += ["optimization.max_epoch=1", "common.log_format=json", "generation.nbest=2"]
    lstm = table(recipe("models=lstm", *sizes))
    assert lstm[1][0] == "lstm"
    log = lines(recipe.work / "logs/runs.lstm.translate.best.log")
    found = [line.split("\t") for line in log if line.startswith("D-")]
    assert len(found) == 2 * SIZES["test_2016_flickr"]
    best = [
        max((row for row in found if row[0] == f"D-{i}"), key=lambda row: float(row[1]))
        for i in range(len(found) // 2)
    ]
    assert lines(recipe.work / "runs/lstm/best.de") == [text for *_, text in best]
    recipe("models=transformer", "run=compare")
    yaml = (recipe.work / "runs/compare/train.yaml").read_text()
    assert "_name: transformer_iwslt_de_en" in yaml and "decoder_ffn_embed_dim: 256" in yaml
    options = ["rounds=1", "speed_updates=4", "compare=compare,lstm"]
    rows = table(recipe(*options))
    assert [row[0] for row in rows] == ["run", "compare", "lstm"]
    assert [float(number) > 0 for row in rows[1:] for number in row[4:]] == [True] * 4
    assert rows[2][:4] == lstm[1]
    assert (recipe.work / "runs/compare/checkpoint_best.pt").exists()
    assert len(table(recipe(*options[:2], "compare=lstm"))) == 2
    assert len(table(recipe(*options))) == 3  # the logs of the first comparison are not in the way
    assert recipe("--dry-run", *options).count("fairseq-generate") == 2
    assert "has no scores of lrn, best: train it first" in recipe.refused("compare=lrn")
    write(recipe.work / "runs/compare/best.de", "other translations")
    message = "runs/compare/translate.best was made from other files than "
    assert message in recipe.refused(*options)
    assert "speed_updates must be a positive multiple of 4" in recipe.refused("speed_updates=6")


def test_missing_data(recipe):
    (recipe.cwd / "empty").mkdir(exist_ok=True)
    assert "--data nowhere is not a folder" in recipe.refused("--data", "nowhere", "--work", "new")
    assert "neither train.en nor train.en.gz in empty" in recipe.refused("--data", "empty", "--work", "new")
    assert not (recipe.cwd / "new").exists()


@pytest.mark.parametrize(
    "option, words",
    [
        ("vocab_size=9", "vocab_size is 9, but must be more than"),
        ("vocab_size=90000", "vocab_size is 90000, but must be at most"),
        (
            "task.max_source_positions=5",
            "cannot read all of train: 90 of 90 have more than 5 tokens, which task.max_source_positions=",
        ),
        ("dataset.max_tokens=5", "have more than 5 tokens, which dataset.max_tokens="),
        (
            "model.encoder_layer=2",
            "there is no option model.encoder_layer (did you mean model.encoder_layers",
        ),
        ("generation.beam=0", "generation.beam is 0, but must be positive"),
        ("generation.max_len_b=-1", "generation.max_len_b is -1, but must be positive"),
        ("model.encoder_layers=0", "fairseq-hydra-train ended with 1, see"),
    ],
)
def test_what_cannot_be_trained_is_refused(recipe, option, words):
    assert words in recipe.refused("--work", f"w {option}", option)


def bad(folder, name, change):
    """Change a file of the data."""
    path = folder / name
    content = path.read_bytes()
    write(path, change(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content))
    return folder


def without_a_line(text):
    return text[text.index(b"\n") + 1 :]


@pytest.mark.parametrize(
    "name, change, where, words",
    [
        ("val.de", without_a_line, "val.en, line 10", "the other language has no sentence for this one"),
        ("val.en", lambda text: text + b"One more.\n", "val.en, line 11", "val.de ends after line 10"),
        ("val.en", lambda text: b"", "val.de, line 1", "no sentence for this one: there is none"),
        ("val.en", lambda text: b" \n" + without_a_line(text), "val.en, line 1", "there is no text"),
        ("val.en", lambda text: text[:40] + b"\xff" + text[40:], "val.en, line 2", "this is not UTF-8"),
        ("train.en.gz", lambda text: gzip.compress(text)[:-20], "train.en.gz", "is not a whole gzip file"),
    ],
)
def test_text_that_is_wrong_is_refused(recipe, tmp_path, name, change, where, words):
    bad(multi30k(tmp_path), name, change)
    message = recipe.refused("--data", str(tmp_path), "--work", str(tmp_path / "work"))
    assert f"multi30k.py: {tmp_path}/{where}" in message and words in message


def test_text_that_looks_odd_is_read(recipe, tmp_path):
    """CRLF, a BOM and a missing end are left out, empty training pairs too; other ends are in the line."""
    data = multi30k(tmp_path)
    odd = "A\rman \u2028waits\u0085 in\u00a0the park."
    for language in ("en", "de"):
        train = gzip.decompress((data / f"train.{language}.gz").read_bytes()).decode("utf-8")
        write(data / f"train.{language}.gz", "\ufeff" + train.replace("\n", "\r\n") + f"{odd}\r\n\r\n{odd}")
        bad(data, f"test_2016_flickr.{language}", lambda text: text + odd.encode("utf-8"))
    bad(data, "train.en.gz", lambda text: text[:-3])
    options = [
        *ONE_LAYER,
        "vocab_size=150",
        "average=2",
        "dataset.max_tokens=300",
        "optimization.max_update=2",
    ]
    output = recipe("--data", str(data), "--work", str(tmp_path / "work"), *options)
    assert "average is 2, but lrn_tiny has 0 whole epochs: the last checkpoint translates" in output
    assert "1 of 93 pairs have an empty side and are left out" in output and "train.en.gz, line 92" in output
    for language in ("en", "de"):
        train = gzip.decompress((multi30k(tmp_path / "same") / f"train.{language}.gz").read_bytes())
        written = (tmp_path / f"work/text/train.{language}").read_bytes()
        assert written.startswith(train) and written.count(b"\n") == 92
        assert lines(tmp_path / f"work/text/test.{language}")[-1] == odd
    assert len(lines(tmp_path / "work/runs/lrn_tiny/last.de")) == 12


SOURCE = {"iwslt14": "de", "wmt14": "en"}
TARGET = {"iwslt14": "en", "wmt14": "de"}
UNEVEN = {"en": "Yes.", "de": "Ja, das ist nun aber wirklich ganz und gar nicht dasselbe."}


def sentences(language):
    """Sentences to train on (70), the last pair being of uneven lengths, to validate (3) and to test (15)."""
    if "MULTI30K" in os.environ:
        found = real("train", language)
    else:
        found = [pair[language == "de"] for pair in made()]
    return [*found[:69], UNEVEN[language]], found[69:72], found[72:87]


def iwslt14(language):
    train, valid, test = sentences(language)
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
    files = {f"train.tags.de-en.{language}": talks}
    for i, name in enumerate(["TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"]):
        segments = [
            f'<seg id="{n}"> {sentence} </seg>' for n, sentence in enumerate(test[3 * i : 3 * i + 3], 1)
        ]
        files[f"IWSLT14.{name}.de-en.{language}.xml"] = [f"<title>{name}</title>", *segments]
    return files


def wmt14(language):
    train, valid, test = sentences(language)
    files = {f"newstest2013.{language}": valid, f"newstest2014.{language}": test}
    for i, name in enumerate(["europarl-v7", "commoncrawl", "news-commentary-v9"]):
        files[f"{name}.de-en.{language}"] = train[30 * i : 30 * i + 30]
    return files


@pytest.fixture(scope="module", params=[iwslt14, wmt14], ids=["iwslt14", "wmt14"])
def published(request, start, tmp_path_factory):
    """A recipe that has been run, on text in data/, for one update."""
    name = request.param.__name__
    cwd = tmp_path_factory.mktemp(name)
    for language in ("en", "de"):
        for file, found in request.param(language).items():
            write(cwd / "data" / file, text(found))
    model = {"iwslt14": [], "wmt14": ["model.encoder_ffn_embed_dim=8", "optimization.update_freq=1"]}[name]
    sizes = [f"model.{side}_embed_dim=16" for side in ("encoder", "decoder")]
    options = [*SHORT, *ONE_LAYER, *sizes, *model, "optimization.max_update=1"]
    recipe = Recipe(start, cwd, f"translation/{name}.py", "--data", "data", *options)
    recipe.name, recipe.work = name, cwd / name
    recipe.output = recipe("run=run")
    return recipe


def test_published_recipe(published):
    name, work = published.name, published.work
    for language in ("en", "de"):
        for split, expected in zip(("train", "valid", "test"), sentences(language)):
            assert lines(work / f"text/{split}.{language}") == expected
    pairs = [len(lines(work / f"subwords/train.{language}")) for language in (SOURCE[name], TARGET[name])]
    assert 35 < pairs[0] == pairs[1] < 70

    run = work / "runs/run"
    assert len(lines(run / f"best.{TARGET[name]}")) == 15
    searched = {"iwslt14": "--beam 5 ", "wmt14": "--beam 4 --lenpen 0.6 "}[name]
    assert searched in published.output
    assert all(line.endswith(" .") for line in lines(run / f"best.reference.tok.{TARGET[name]}"))
    assert "run: BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in published.output
    assert "run: chrF2|nrefs:1|case:mixed|" in published.output
    assert "run: BLEU|nrefs:1|case:lc|eff:no|tok:none|" in published.output
    assert len(table(published.output)[1]) == 5


def test_a_published_recipe_trains_as_fairseq_train_does(run, published, tmp_path):
    options = "--max-update 1 --max-tokens 20000 --encoder-layers 1 --decoder-layers 1".split()
    options += "--encoder-embed-dim 16 --decoder-embed-dim 16".split()
    if published.name == "wmt14":
        options += "--encoder-ffn-embed-dim 8 --update-freq 1".split()
    assert_trains_the_same(run, published.work, "run", tmp_path, *options)


def test_a_published_recipe_translates_natively(published):
    assert_translates_natively(published.work, "runs/run/checkpoint_best.pt")


def test_deepnmt_shares_the_decoders_embeddings_only(published):
    if published.name == "wmt14":
        yaml = published("models=deepnmt_tiny", "model.encoder_ffn_embed_dim=8", status=1)
        assert "there is no option model.encoder_ffn_embed_dim" in yaml


ARCHIVES = {
    "iwslt14": [("de-en", "de-en/", "*")],
    "wmt14": [
        ("training-parallel-europarl-v7", "training/", "europarl-v7.*"),
        ("training-parallel-commoncrawl", "", "commoncrawl.*"),
        ("training-parallel-nc-v9", "training/", "news-commentary-v9.*"),
    ],
}


def test_fetched_text_is_the_same(start, published, tmp_path):
    """By curl, of archives here, and of sacreBLEU's test sets fetched before."""
    data, urls = published.cwd / "data", []
    for archive, prefix, files in ARCHIVES[published.name]:
        urls.append(f"file://{tmp_path}/{archive}.tgz")
        with tarfile.open(tmp_path / f"{archive}.tgz", "w:gz") as tar:
            for path in data.glob(files):
                tar.add(path, prefix + path.name)
    for path in data.glob("newstest*"):
        known = {"newstest2013": "wmt13", "newstest2014": "wmt14/full"}[path.stem]
        (tmp_path / known).mkdir(parents=True, exist_ok=True)
        for field in {".en": ["src"], ".de": ["ref", "docid", "genre", "origlang"]}[path.suffix]:
            shutil.copy(path, tmp_path / known / f"{known.replace('/', '_')}.en-de.{field}")
    option = f"url={urls[0]}" if len(urls) == 1 else f"urls=[{','.join(urls)}]"
    recipe = Recipe(start, tmp_path, published.script, "--work", "work", "vocab_size=9", option)
    assert "vocab_size is 9, but" in recipe.apart(SACREBLEU=str(tmp_path))  # read when it is imported
    for path in (published.work / "text").iterdir():
        assert path.read_bytes() == (tmp_path / "work/text" / path.name).read_bytes()
    write(tmp_path / "no.tgz", "<html>")
    message = recipe.refused(option.replace(urls[-1], f"file://{tmp_path}/no.tgz"))
    assert "no.tgz is not a whole archive: Not a gzipped file" in message


def test_fetched_multi30k_is_the_same(start, recipe, tmp_path):
    for path in (recipe.cwd / "data").iterdir():
        content = path.read_bytes() if path.suffix == ".gz" else gzip.compress(path.read_bytes())
        write(tmp_path / f"{path.name.replace('.gz', '')}.gz", content)
    fetching = Recipe(start, tmp_path, recipe.script, f"url=file://{tmp_path}")
    assert "vocab_size is 9, but" in fetching.refused("vocab_size=9")
    for path in (recipe.work / "text").iterdir():
        assert path.read_bytes() == (tmp_path / "multi30k/text" / path.name).read_bytes()
    assert "fairseq-hydra-train" in fetching("--dry-run")
    assert "curl: (37)" in fetching("url=file:///nowhere", status=1)
