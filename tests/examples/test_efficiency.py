import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from batches import SMALL_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
EFFICIENCY = ROOT / "examples" / "efficiency"


def benchmark(words, folder, **environment):
    pythonpath = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": pythonpath, **environment},
        capture_output=True,
        text=True,
    )


def test_benchmark_prints_every_contender_and_writes_json(tmp_path):
    options = "--shapes 3,2,8 4,1,4 --threads 1 2 --repetitions 1 --json out.json".split()
    run = benchmark([sys.executable, EFFICIENCY / "benchmark.py", *options], tmp_path)
    assert run.returncode == 0, run.stderr

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

    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    headers = [row for row in rows if row[0].startswith("T=")]
    assert [row[0] for row in headers] == ["T=3, B=2, D=8", "T=4, B=1, D=4"]
    body = [row for row in rows if row not in headers]
    assert sorted(row[0] for row in body) == sorted(2 * list(expected))
    assert all(len(row) == 1 + 2 * 2 * 2 for row in rows)
    assert all(float(cell) >= 0 for row in body for cell in row[1:])


def test_without_a_card_the_cuda_benchmark_runs_through_and_says_where_it_stops(tmp_path):
    run = benchmark(["bash", EFFICIENCY / "cuda.sh", "measure"], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert all(f"{part}: done" in run.stderr for part in ("operator", "layer", "training"))
    last = run.stdout.splitlines()[-1]
    assert last.startswith("Stopped before measuring: there is no CUDA card.")
    assert "TB/s" not in run.stdout


def test_cuda_command_names_a_step_it_does_not_know(tmp_path):
    run = benchmark(["bash", EFFICIENCY / "cuda.sh", "bild"], tmp_path)
    assert run.returncode == 1
    assert "want build, test, sanitize or measure" in run.stderr


def test_units_prints_every_unit_beside_the_paper(tmp_path):
    sizes = {"width": 16, "layers": 2, "words": 60, "sentences": 2, "length": 5, "updates": 1}
    options = ["--rounds", "1", "--sizes", json.dumps(sizes), "--json", "out.json", "--plot", "out.png"]
    run = benchmark([sys.executable, EFFICIENCY / "units.py", *options], tmp_path)
    assert run.returncode == 0, run.stderr
    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(measured) == ["lrn", "olrn", "gru", "lstm", "atr", "sru"]
    assert rows[0][3] == rows[0][6] == "1.00"
    assert rows[2][4] == "2.70"
    assert len({one["parameters"] for (one,) in measured.values()}) > 3
    assert all(value >= 0 for (one,) in measured.values() for value in one.values())
    assert (tmp_path / "out.png").stat().st_size > 0


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


def test_decoding_prints_every_run_and_writes_json(translated, tmp_path):
    assert len(set((translated / "text" / "test.de").read_text(encoding="utf-8").splitlines())) > 9
    options = "--beam 1 --batch-size 1 64 --threads 1 --rounds 1 --json out.json --plot out.png".split()
    runs = ["late", "early:translation"]
    run = benchmark([sys.executable, EFFICIENCY / "decoding.py", translated, *runs, *options], tmp_path)
    assert run.returncode == 0, run.stderr

    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    assert [(one["batch_size"], one["run"]) for one in measured] == [
        (b, run) for b in (1, 64) for run in runs
    ]
    results = {(one["batch_size"], one["run"]): one["rounds"][0] for one in measured}
    assert [result["sentences"] for result in results.values()] == [3, 3, 21, 21]
    for batch_size in (1, 64):
        bleu = [results[batch_size, run]["bleu"] for run in runs]
        assert bleu[0] == pytest.approx(100) and bleu[1] < 90
    assert all(result["memory"] > 100 for result in results.values())

    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["model", "---", *runs]
    assert rows[2][1] == "100.0" and rows[2][3] == rows[2][6] == "1.00"
    for column, batch_size in ((2, 1), (5, 64)):
        late, early = (results[batch_size, run]["speed"] for run in runs)
        assert rows[0][column] == f"sentences/s, batch {batch_size}"
        assert float(rows[3][column]) == pytest.approx(early, abs=0.051)
        assert float(rows[3][column + 1]) == pytest.approx(early / late, abs=0.0051)
    assert (tmp_path / "out.png").stat().st_size > 0


def test_decoding_names_the_run_that_fails(translated, tmp_path):
    options = "--beam 1 --batch-size 64 --threads 1 --rounds 1".split()
    runs = ["late:unheard_of", "early"]
    run = benchmark([sys.executable, EFFICIENCY / "decoding.py", translated, *runs, *options], tmp_path)
    assert run.returncode == 1
    assert "late:unheard_of: fairseq-generate failed:" in run.stderr
    assert "invalid choice: 'unheard_of'" in run.stderr
    assert "Traceback" not in run.stderr
