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
from recipes import Recipe

import fairseq_lrn.tasks  # noqa: F401  registers them
from fairseq_lrn.models import LRNLanguageModel
from fairseq_lrn.models.lrn_lm import LRNLanguageModelConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/language_modeling"
SHORT = ["--decoder-embed-dim", "16", "--decoder-hidden-size", "16", "--adaptive-softmax-cutoff", "10,40"]
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
def data(tmp_path_factory):
    """A folder as WIKITEXT2 takes it, without a training text."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("valid", 300), ("test", 200)):
        lines = made(size // 10)
        if "WIKITEXT2" in os.environ:
            source = Path(os.environ["WIKITEXT2"], f"{name}.txt")
            lines = source.read_text(encoding="utf-8").splitlines()[:size]
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    return Recipe(
        "language_modeling", tmp_path_factory.mktemp("cwd"), WIKITEXT2=str(data), SMALL="1", MAX_EPOCH="1"
    )


@pytest.fixture(scope="module")
def done(recipe):
    result = recipe("wikitext2.sh", "lrn", "--", *SHORT)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def test_table(recipe, done):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[-3:]]
    assert rows[0] == ["unit", "parameters", "validation perplexity", "test perplexity", "training s/batch"]
    unit, parameters, *numbers = rows[2]
    assert unit == "lrn"
    assert int(parameters.replace(",", "")) > 1000
    assert all(float(number) > 0 for number in numbers)
    for split, printed in zip(("valid", "test"), numbers):
        lines = (recipe.work / "raw" / split).read_text(encoding="utf-8").splitlines()
        words = sum(len(line.split()) + 1 for line in lines)
        log = (recipe.work / "lrn" / f"{split}.log").read_text()
        assert f"Evaluated {words:,} tokens" in log
        assert f"Perplexity: {printed}" in log


def test_halves_are_the_test_text_cut_before_an_article(recipe, data, done):
    first, second = ((recipe.work / "raw" / name).read_bytes() for name in ("valid", "test"))
    assert first + second == (data / "test.txt").read_bytes()
    assert re.match(rb" = [^=]+ = \n", second)
    assert (recipe.work / "raw/train").read_bytes() == (data / "valid.txt").read_bytes()


def test_a_second_run_repeats_the_table_only(recipe, done):
    files = [path for folder in ("lrn", "bin", "raw") for path in (recipe.work / folder).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = recipe("wikitext2.sh", "lrn", "--", *SHORT)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again.stdout.splitlines() == done.stdout.splitlines()[-3:]


@pytest.mark.parametrize(
    "words, settings, expected",
    [
        (["rnn"], {}, "CELL is rnn, but must be lrn, olrn, lstm, gru, atr or sru"),
        ([], {"WIKITEXT2": "nowhere"}, "WIKITEXT2=nowhere is not a folder"),
        ([], {"SMALL": ""}, "neither train.txt nor wiki.train.tokens in WIKITEXT2="),
    ],
)
def test_errors(recipe, words, settings, expected):
    result = recipe("wikitext2.sh", *words, **{"WORK": "other", **settings})
    assert result.returncode != 0
    assert expected in result.stderr


@pytest.fixture(scope="module")
def evaluate(run, recipe, done):
    """Base-2 loss, and the number of tokens, of the test text under dynamic evaluation."""

    def command(*options):
        out = run(
            EXAMPLE / "dynamic_eval.py", recipe.work / "bin", "--user-dir", ROOT / "fairseq_lrn", "--cpu",
            "--path", recipe.work / "lrn/checkpoint_best.pt", "--gen-subset", "test", *options,
        )  # fmt: skip
        found = re.search(r"Evaluated ([\d,]+) tokens\nLoss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", out)
        assert 2 ** float(found[2]) == pytest.approx(float(found[3]), rel=1e-3)
        return float(found[2]), found[1]

    return command


def test_without_a_step_it_is_static_evaluation(recipe, evaluate):
    loss, words = evaluate("--update", "sgd", "--learning-rate", 0, "--decay", 0, "--tokens-per-sample", 50)
    log = (recipe.work / "lrn/test.log").read_text()
    assert loss == pytest.approx(float(re.search(r"Loss \(base 2\): ([\d.]+)", log)[1]), abs=2e-4)
    assert f"Evaluated {words} tokens" in log


def test_learning_from_the_text_lowers_its_perplexity(evaluate):
    static, words = evaluate("--update", "sgd", "--learning-rate", 0, "--tokens-per-sample", 20)
    for update, lr in (("sgd", 0.5), ("rms", 0.001)):
        options = ["--learning-rate", lr, "--decay", 0.001, "--tokens-per-sample", 20, "--batch-size", 4]
        loss, counted = evaluate("--update", update, *options)
        assert loss < static - 0.05
        assert counted == words


@pytest.mark.parametrize("update", ["sgd", "rms"])
def test_a_model_that_diverges_is_an_error(run, recipe, done, update):
    out = run(
        EXAMPLE / "dynamic_eval.py", recipe.work / "bin", "--user-dir", ROOT / "fairseq_lrn", "--cpu",
        "--path", recipe.work / "lrn/checkpoint_best.pt", "--gen-subset", "test", "--update", update,
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
