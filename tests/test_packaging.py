"""The package as it installs from what git tracks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from fairseq_lrn.modules import LRN
LRN(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
import fairseq_lrn.models
print(torch.ops.fairseq_lrn.lrn_scan)
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_installs_from_a_fresh_clone(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", site, clone], check=True)

    def python(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.strip()

    assert python("-m", "fairseq_lrn") == str(site / "fairseq_lrn")
    # the warning of a package without its compiled operator would be an error
    assert "lrn_scan" in python("-W", "error:The compiled LRN operator", "-c", PROGRAM)
