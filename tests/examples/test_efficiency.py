import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import SMALL_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
EFFICIENCY = ROOT / "examples" / "efficiency"
sys.path.insert(0, str(EFFICIENCY))
import arguments  # noqa: E402

BEFORE = f"""
import os, subprocess, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
os.chdir({{folder!r}})
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import forked
if {torch.version.cuda is None}:  # a process that knows a card cannot be forked
    subprocess.Popen = forked.Popen
"""


@pytest.fixture
def benchmark(start, tmp_path):
    """Run a script of examples/efficiency in tmp_path; returns its exit status and all its output."""

    def command(script, *words):
        process = start(EFFICIENCY / script, *words, before=BEFORE.format(folder=str(tmp_path)))
        process.join()
        return process.exitcode, process.output.read_text(encoding="utf-8")

    return command


def rows(output):
    """The cells of the table."""
    return [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]


def test_products_prints_every_contender(benchmark):
    status, output = benchmark("products.py", "--shapes", "3,8,20", "1,40,7", "--repetitions", "1")
    assert status == 0, output
    header, *table = rows(output)
    assert header[1:4] == ["float32", "bfloat16", "int8"] and len(header) == 7
    assert [row[0] for row in table] == ["3, 8, 20", "1, 40, 7"]
    assert all(len(row) == 7 for row in table)


def test_benchmark_prints_every_contender_and_writes_json(benchmark, tmp_path):
    options = "--shapes 3,2,8 4,1,4 --threads 1 2 --repetitions 1 --json out.json".split()
    status, output = benchmark("benchmark.py", *options)
    assert status == 0, output

    report = json.loads((tmp_path / "out.json").read_text())
    expected = {
        "LRN, padding mask",
        "its projection alone",
        "nn.LSTM, oneDNN",
        "nn.LSTM, without oneDNN",
        "nn.GRU",
        "LRN, reference loop",
    }
    if not report["environment"]["sru"].startswith("left out"):
        expected.add("SRU")
    configurations = [(result["shape"], result["threads"]) for result in report["results"]]
    assert configurations == [([3, 2, 8], 1), ([3, 2, 8], 2), ([4, 1, 4], 1), ([4, 1, 4], 2)]
    for result in report["results"]:
        assert set(result["ms"]) == expected
        for passes in result["ms"].values():
            assert {kind: len(times) for kind, times in passes.items()} == {"fwd": 1, "fwd+bwd": 1}

    table = rows(output)
    headers = [row for row in table if row[0].startswith("T=")]
    assert [row[0] for row in headers] == ["T=3, B=2, D=8", "T=4, B=1, D=4"]
    body = [row for row in table if row not in headers]
    assert sorted(row[0] for row in body) == sorted(2 * list(expected))
    assert all(len(row) == 1 + 2 * 2 * 2 for row in table)
    assert all(float(cell) >= 0 for row in body for cell in row[1:])


def test_without_a_card_the_cuda_benchmark_runs_through_and_says_where_it_stops(benchmark):
    status, output = benchmark("benchmark_cuda.py")
    assert status == 0, output
    assert all(f"{part}: done" in output for part in ("operator", "layer", "training"))
    assert output.splitlines()[-1].startswith("Stopped before measuring: there is no CUDA card.")
    assert "TB/s" not in output


def cuda(folder, *words):
    """Run cuda.sh, with a ``python`` that says what it is called with."""
    (folder / "python").write_text("#!/bin/sh\necho python $@\n")
    (folder / "python").chmod(0o755)
    env = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    return subprocess.run(["bash", EFFICIENCY / "cuda.sh", *words], env=env, capture_output=True, text=True)


def test_cuda_command_takes_steps_and_options(tmp_path):
    done = cuda(tmp_path, "test", "measure", "translate", "--", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("python -m pytest -q tests/ops")
    assert second == "python examples/efficiency/benchmark_cuda.py --json out.json"
    assert third == "python examples/efficiency/decoding_cuda.py"


def test_cuda_command_names_a_step_it_does_not_know(tmp_path):
    done = cuda(tmp_path, "bild")
    assert done.returncode == 1
    assert "want build, test, sanitize, measure or translate" in done.stderr


def test_units_prints_every_unit_beside_the_paper(benchmark, tmp_path):
    sizes = {"width": 16, "layers": 2, "words": 60, "sentences": 2, "length": 5, "updates": 1}
    options = ["--rounds", "1", "--sizes", json.dumps(sizes), "--json", "out.json", "--plot", "out.png"]
    status, output = benchmark("units.py", *options)
    assert status == 0, output
    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    table = rows(output)[1:]
    assert [row[0] for row in table] == list(measured) == ["lrn", "olrn", "gru", "lstm", "atr", "sru"]
    assert table[0][3] == table[0][6] == "1.00"
    assert table[2][4] == "2.70"
    assert len({one["parameters"] for (one,) in measured.values()}) > 3
    assert all(value >= 0 for (one,) in measured.values() for value in one.values())
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (arguments.positive, "0", "0 is given, but it must be at least 1"),
        (arguments.output, "missing/out.json", "there is no folder missing"),
        (arguments.output, ".", ". is a folder, but must be a file"),
        (arguments.picture, "missing/out.png", "there is no folder missing"),
        (arguments.picture, "out.xyz", "out.xyz must end in one of ."),
    ],
)
def test_types_of_arguments(monkeypatch, tmp_path, read, text, message):
    monkeypatch.chdir(tmp_path)
    assert (arguments.positive("2"), arguments.picture("out.PNG")) == (2, Path("out.PNG"))
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        read(text)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("benchmark.py", ["--shapes", "3,2"], "argument --shapes: invalid shape value: '3,2'"),
        ("benchmark_cuda.py", ["--json", "missing/out.json"], "argument --json: there is no folder missing"),
        (
            "units.py",
            ["--sizes", '{"height": 3}'],
            'argument --sizes: {"height": 3} must be an object of width',
        ),
        ("decoding.py", [".", "run"], "run: no runs/run/checkpoint_best.pt"),
    ],
)
def test_wrong_arguments_are_refused_before_measuring(benchmark, script, options, message):
    status, output = benchmark(script, *options)
    assert status != 0
    assert message in output.splitlines()[-1]
    assert not rows(output)


@pytest.fixture(scope="module")
def translated(run, data, tmp_path_factory):
    """A recipe's folder: runs early and late, and as the references what late translates greedily."""
    work = tmp_path_factory.mktemp("work")
    plugin = ["--user-dir", ROOT / "fairseq_lrn"]
    options = (
        "--arch lrn_tiny --share-all-embeddings --optimizer adam --lr 0.01 --criterion cross_entropy "
        "--max-tokens 400 --dropout 0 --max-update 600 --save-interval-updates 50 --disable-validation "
        "--num-workers 0 --required-batch-size-multiple 1 --seed 3 --cpu"
    ).split()
    run("fairseq-train", data, *plugin, *options, *SMALL_OPTIONS, "--save-dir", work / "all")
    for folder, checkpoint, updates in (("early", "average10", 50), ("late", "best", 600)):
        (work / "runs" / folder).mkdir(parents=True)
        (saved,) = (work / "all").glob(f"checkpoint_*_{updates}.pt")
        shutil.copy(saved, work / "runs" / folder / f"checkpoint_{checkpoint}.pt")
    (work / "runs/early/checkpoint_best.pt").write_text("The average comes first.")
    (work / "bin").symlink_to(data)
    search = "--cpu --beam 1 --remove-bpe sentencepiece --required-batch-size-multiple 1".split()
    output = run("fairseq-generate", data, *plugin, "--path", work / "runs/late/checkpoint_best.pt", *search)
    found = {int(number): text for number, text in re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.M)}
    (work / "text").mkdir()
    text = "\n".join(found[number] for number in sorted(found))  # the last line has no end
    (work / "text" / "test.de").write_text(text, encoding="utf-8")
    return work


def test_decoding_prints_every_run_and_writes_json(benchmark, translated, tmp_path):
    assert len(set((translated / "text" / "test.de").read_text(encoding="utf-8").splitlines())) > 9
    options = "--beam 1 --batch-size 1 64 --threads 1 --rounds 1 --json out.json --plot out.png".split()
    runs = ["late:translator", "early:translation"]
    status, output = benchmark("decoding.py", translated, *runs, *options)
    assert status == 0, output

    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    assert [(one["batch_size"], one["run"]) for one in measured] == [
        (b, run) for b in (1, 64) for run in runs
    ]
    results = {(one["batch_size"], one["run"]): one["rounds"][0] for one in measured}
    assert all(result["sentences"] == 21 for result in results.values())
    for batch_size in (1, 64):
        bleu = [results[batch_size, run]["bleu"] for run in runs]
        assert bleu[0] == pytest.approx(100) and bleu[1] < 90
    assert all(result["memory"] > 100 for result in results.values())

    table = rows(output)
    assert [row[0] for row in table] == ["model", "---", *runs]
    assert table[2][1] == "100.0" and table[2][3] == table[2][6] == "1.00"
    for column, batch_size in ((2, 1), (5, 64)):
        late, early = (results[batch_size, run]["speed"] for run in runs)
        assert table[0][column] == f"sentences/s, batch {batch_size}"
        assert float(table[3][column]) == pytest.approx(early, abs=0.051)
        assert float(table[3][column + 1]) == pytest.approx(early / late, abs=0.0051)
    assert (tmp_path / "out.png").stat().st_size > 0


def test_decoding_names_the_run_that_fails(benchmark, translated):
    options = "--beam 1 --batch-size 64 --threads 1 --rounds 1".split()
    runs = ["late:unheard_of", "early"]
    status, output = benchmark("decoding.py", translated, *runs, *options)
    assert status == 1
    assert "late:unheard_of: fairseq-generate failed:" in output
    assert "invalid choice: 'unheard_of'" in output
    assert "Traceback" not in output


def test_growth_measures_each_model_at_each_size(benchmark, tmp_path):
    words = "--lengths 3 5 --widths 8 --length 4 --width 16 --tokens 8 --words 20 --seconds 0".split()
    status, output = benchmark("growth.py", *words, "--json", "out.json", "--plot", "out.png")
    assert status == 0, output
    report = json.loads((tmp_path / "out.json").read_text())
    names = ["LRN", "Transformer", "LSTM"]
    found = {
        axis: [(x["model"], x["length"], x["width"]) for x in report[axis]] for axis in ("length", "width")
    }
    assert found == {
        "length": [(name, length, 16) for length in (3, 5) for name in names],
        "width": [(name, 4, 8) for name in names],
    }
    assert all(x["words_per_second"] > 0 for axis in found for x in report[axis])
    assert len(rows(output)) == 1 + 9
    assert (tmp_path / "out.png").stat().st_size > 0
