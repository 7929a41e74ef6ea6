"""examples/language_modeling on a slice: of the real text in $WIKITEXT2, else of a text made here."""

import math
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from batches import dictionary
from recipes import Recipe, assert_trains_the_same, lines, table, times, write

import fairseq_lrn.tasks  # noqa: F401  registers them
from fairseq_lrn.models import LRNLanguageModel
from fairseq_lrn.models.lrn_lm import LRNLanguageModelConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/language_modeling"
SHORT = (
    "model.decoder_embed_dim=16 model.decoder_hidden_size=16 model.adaptive_softmax_cutoff=[10,40]".split()
)
OPTIONS = (
    "--decoder-embed-dim 16 --decoder-hidden-size 16 --adaptive-softmax-cutoff 10,40 --max-epoch 1".split()
)
sys.path.insert(0, str(EXAMPLE))
import dynamic_eval  # noqa: E402


def made(articles):
    """Articles that each tell of a year of their own."""
    lines = []
    for year in range(1900, 1900 + articles):
        lines += ["", f" = Year {year} = ", ""]
        lines += [
            f" In {year} the river {verb} , and {year} went by . " for verb in ("rose", "fell", "froze")
        ]
        lines += ["", " = = Weather = = ", "", f" It was a mild winter in {year} . "]
    return lines


@pytest.fixture(scope="module")
def recipe(start, tmp_path_factory):
    """A run on a folder without a training text."""
    cwd = tmp_path_factory.mktemp("wikitext2")
    for name, size in (("valid", 300), ("test", 200)):
        text = made(size // 10)
        if "WIKITEXT2" in os.environ:
            text = Path(os.environ["WIKITEXT2"], f"{name}.txt").read_text(encoding="utf-8").split("\n")[:size]
        write(cwd / f"data/{name}.txt", "".join(line + "\n" for line in text))
    options = [*SHORT, "models=lrn", "optimization.max_epoch=1"]
    recipe = Recipe(start, cwd, "language_modeling/wikitext2.py", "--data", "data", *options)
    recipe.work = cwd / "wikitext2"
    recipe.output = recipe("small=true")
    return recipe


def test_table(recipe):
    header, row = table(recipe.output)
    assert header == ["unit", "parameters", "validation perplexity", "test perplexity", "training s/batch"]
    assert row[0] == "lrn" and int(row[1].replace(",", "")) > 1000
    log = (recipe.work / "logs/runs.lrn.perplexity.log").read_text()
    for split, printed in zip(("valid", "test"), row[2:4]):
        words = sum(len(line.split()) + 1 for line in lines(recipe.work / f"text/{split}"))
        assert f"Evaluated {words:,} tokens" in log and f"Perplexity: {printed}" in log


def test_it_trains_as_fairseq_train_does(run, recipe, tmp_path):
    assert_trains_the_same(run, recipe.work, "lrn", tmp_path, *OPTIONS)


def test_halves_are_the_test_text_cut_before_an_article(recipe):
    first, second = ((recipe.work / "text" / name).read_bytes() for name in ("valid", "test"))
    assert first + second == (recipe.cwd / "data/test.txt").read_bytes()
    assert re.match(rb" = [^=]+ = \n", second)
    assert (recipe.work / "text/train").read_bytes() == (recipe.cwd / "data/valid.txt").read_bytes()


def test_a_second_run_repeats_the_table_only(recipe):
    before = times(recipe.work)
    assert table(recipe("small=true")) == table(recipe.output)
    assert times(recipe.work) == before


def test_the_whole_text_is_not_the_small_one(recipe, tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{name}.tokens", "\n = A = \n\n The\u2028cat\r sat .\r\n and\u0085went")
    message = recipe.refused("--data", str(tmp_path))
    assert "has runs (lrn) that were trained before small became False (it was True)" in message
    assert "cannot specify cutoff larger than vocab size" in recipe(
        "--data", str(tmp_path), "--work", str(tmp_path / "work"), status=1
    )
    text = (tmp_path / "work/text/train").read_text(encoding="utf-8")
    assert text == "\n = A = \n\n The cat  sat .\n and went\n"


def test_errors(recipe, tmp_path):
    assert "neither train.txt nor train.txt.gz in data" in recipe.refused("--work", "other")
    for name in ("valid", "test"):
        write(tmp_path / f"{name}.txt", " = A = \n\n\n a b c\n")
    options = ["--data", str(tmp_path), "--work", "other", "small=true"]
    assert f"no article begins in the second half of {tmp_path}/test.txt" in recipe.refused(*options)
    write(tmp_path / "test.txt", " = A = \n\n = B = \n")
    write(tmp_path / "valid.txt", "\n \n")
    assert "there is no text for train" in recipe.refused(*options)


@pytest.fixture(scope="module")
def evaluate(run, recipe):
    """Base-2 loss, and the number of tokens, of the test text under dynamic evaluation."""

    def command(*options):
        out = run(
            EXAMPLE / "dynamic_eval.py", recipe.work / "bin", "--user-dir", ROOT / "fairseq_lrn", "--cpu",
            "--path", recipe.work / "runs/lrn/checkpoint_best.pt", "--gen-subset", "test", *options,
        )  # fmt: skip
        found = re.search(r"Evaluated ([\d,]+) tokens\nLoss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", out)
        assert 2 ** float(found[2]) == pytest.approx(float(found[3]), rel=1e-3)
        return float(found[2]), found[1]

    return command


def test_without_a_step_it_is_static_evaluation(recipe, evaluate):
    loss, words = evaluate("--update", "sgd", "--learning-rate", 0, "--decay", 0, "--tokens-per-sample", 50)
    log = (recipe.work / "logs/runs.lrn.perplexity.log").read_text()
    assert loss == pytest.approx(float(re.findall(r"Loss \(base 2\): ([\d.]+)", log)[1]), abs=2e-4)
    assert f"Evaluated {words} tokens" in log


def test_learning_from_the_text_lowers_its_perplexity(evaluate):
    static, words = evaluate("--update", "sgd", "--learning-rate", 0, "--tokens-per-sample", 20)
    for update, lr in (("sgd", 0.5), ("rms", 0.001)):
        options = ["--learning-rate", lr, "--decay", 0.001, "--tokens-per-sample", 20, "--batch-size", 4]
        loss, counted = evaluate("--update", update, *options)
        assert loss < static - 0.05
        assert counted == words


@pytest.mark.parametrize("update", ["sgd", "rms"])
def test_a_model_that_diverges_is_an_error(run, recipe, update):
    out = run(
        EXAMPLE / "dynamic_eval.py", recipe.work / "bin", "--user-dir", ROOT / "fairseq_lrn", "--cpu",
        "--path", recipe.work / "runs/lrn/checkpoint_best.pt", "--gen-subset", "test", "--update", update,
        "--learning-rate", 1e9, "--tokens-per-sample", 100, "--batch-size", 20, check=False,
    )  # fmt: skip
    assert re.fullmatch(r"the loss of a word in block \d+ is \S+: the model diverged", out.splitlines()[-1])
    assert "Perplexity" not in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--learning-rate", -1], "--learning-rate is -1.0, but must be 0 or positive"),
        (["--decay", 2], "--decay is 2.0, but must be from 0 to 1"),
        (["--epsilon", 0], "--epsilon is 0.0, but must be positive"),
        (["--task", "language_modeling"], "--task is language_modeling, but must be truncated_bptt_lm"),
        (["--remove-bpe"], "--post-process is given, but dynamic evaluation does not know it"),
        ([], "--path, a checkpoint, is not given, but must be"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, capsys, options, message):
    command = ["dynamic_eval.py", "bin", *options, *(["--path", "model.pt"] if options else [])]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit):
        dynamic_eval.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


class Line(torch.nn.Module):
    """Two parameters, and the loss of a batch of three words, a number x: 3 * sum((w * x - b) ** 2)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        self.b = torch.nn.Parameter(torch.tensor([0.25]))

    @staticmethod
    def score(model, x):
        return 3 * (model.w * x - model.b).pow(2).sum(), 3


@pytest.mark.parametrize("update", ["sgd", "rms"])
def test_update_is_its_formula(update, monkeypatch):
    monkeypatch.setattr(dynamic_eval, "score", Line.score)
    batches, lr, decay, epsilon = [0.5, 2.0, -1.0], 0.1, 0.2, 0.01
    model = Line()
    start = torch.cat([model.w, model.b]).detach()

    def gradient(point, x):
        error = point[:2] * x - point[2]
        return torch.cat([2 * error * x, -2 * error.sum(0, keepdim=True)])

    roots, scale, rate = None, torch.ones(3), torch.full((3,), decay)
    if update == "rms":
        roots = dynamic_eval.root_mean_squares(model, [1.0, -2.0], torch.device("cpu"))
        s = torch.stack([gradient(start, x) ** 2 for x in (1.0, -2.0)]).mean(0).sqrt()
        torch.testing.assert_close(torch.cat(roots), s)
        scale, rate = s + epsilon, (s / s.mean() * decay).clamp(max=1)
    point, loss = start.clone(), 0.0
    for x in batches:
        loss += 3 * float((point[:2] * x - point[2]).pow(2).sum())
        point = point + rate * (start - point) - lr * gradient(point, x) / scale
    found, words = dynamic_eval.evaluate(model, batches, torch.device("cpu"), lr, decay, epsilon, roots)
    assert words == 9
    assert math.isclose(found, loss, rel_tol=1e-5)
    torch.testing.assert_close(torch.cat([model.w, model.b]).detach(), point)


@pytest.mark.parametrize(
    "options", [{}, {"mixture_of_softmaxes": 2}, {"adaptive_softmax_cutoff": [10, 30]}], ids=str
)
def test_score_is_the_likelihood_of_all_words(options):
    """also of those that stand where the padding does in a cluster of the adaptive softmax: 11 and 31."""
    words = dictionary()
    task = types.SimpleNamespace(source_dictionary=words, target_dictionary=words)
    sizes = {"decoder_embed_dim": 16, "decoder_hidden_size": 16}
    model = LRNLanguageModel.build_model(LRNLanguageModelConfig(**sizes, **options), task).eval()
    tokens = torch.tensor([[5, 11, 31, 10, 50], [31, 4, 2, 1, 1]])
    sample = {"net_input": {"src_tokens": tokens}, "target": tokens, "ntokens": 8}
    loss, counted = dynamic_eval.score(model, sample)
    log_probs = model.get_normalized_probs(model(tokens), log_probs=True)
    expected = -log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2)[tokens.ne(1)].sum()
    torch.testing.assert_close(loss, expected)
    assert counted == 8
