"""examples/analysis: the weights against the states they must sum to, and the command."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ANALYSIS = ROOT / "examples" / "analysis"
sys.path.insert(0, str(ANALYSIS))

import plot  # noqa: E402
from plot import unroll  # noqa: E402

from fairseq_lrn.ops import lrn_scan_reference  # noqa: E402


@pytest.mark.parametrize("output_gate", [False, True], ids=["lrn", "olrn"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_weighted_values_sum_to_the_states(activation, output_gate):
    torch.manual_seed(1)
    projections = 2 * torch.randn(9, (4 if output_gate else 3) * 5, dtype=torch.double)
    states = lrn_scan_reference(projections[:, None], activation=activation, output_gate=output_gate)[:, 0]
    i, f, weights = unroll(projections, states)
    values = projections[:, 10:15]
    torch.testing.assert_close((weights * values).sum(1), states)
    assert (weights[torch.ones(9, 9).triu(1).bool()] == 0).all()
    if activation == "identity" and not output_gate:
        torch.testing.assert_close(weights[6, 3], i[3] * f[4] * f[5] * f[6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.pt", "bin", "spm.model"], "there is no model.pt"),
        ([__file__, "bin", "spm.model"], "there is no bin"),
        ([__file__, ROOT, "spm.model"], "there is no spm.model"),
        ([__file__, ROOT, __file__, "--output", __file__], "a file, but must be a folder"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, capsys, arguments, words):
    command = ["plot.py", *arguments[:3], "5 minutes", *arguments[3:]]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit):
        plot.main()
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "svg"], None),
        (["--side", "decoder", "--layer", 1, "--format", "svg"], None),
        (["--layer", 2], "layer is 2, but the encoder has layers 0 to 1"),
    ],
)
@pytest.mark.parametrize("cell", ["olrn", "gru"])
def test_command(run, data, corpus, tmp_path, cell, options, words):
    sizes = (
        "--arch lrn_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-layers 2 --decoder-layers 2"
    )
    run("fairseq-train", data, "-s", "en", "-t", "de", "--user-dir", ROOT / "fairseq_lrn", *sizes.split(),
        "--cell", cell, "--optimizer", "adam", "--max-tokens", 400, "--max-update", 1, "--cpu",
        "--num-workers", 0, "--save-dir", tmp_path)  # fmt: skip
    if cell == "gru":
        words = "the model's cell is gru, but only lrn and olrn can be unrolled"
    command = [ANALYSIS / "plot.py", tmp_path / "checkpoint_last.pt", data, corpus / "spm.model"]
    output = run(*command, "5 minutes", "--output", tmp_path / "pictures", *options, check=words is None)
    if words is None:
        for name in ("memory", "attention"):
            assert "</svg>" in (tmp_path / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        if "--side" not in options:  # a model that never ends a sentence is cut
            last = run(*command, "5 minutes " * 150, check=False).splitlines()[-1]
            assert re.search(r"the sentence has \d+ tokens, but a picture shows at most 100", last)
    else:
        assert words in output
