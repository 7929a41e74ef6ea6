import json
import os
import subprocess
import sys
from pathlib import Path

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
