import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_prints_every_contender_and_writes_json(tmp_path):
    pythonpath = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = "--shapes 3,2,8 4,1,4 --threads 1 2 --repetitions 1 --json out.json".split()
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/efficiency/benchmark.py"), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
    )
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
