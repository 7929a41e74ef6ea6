"""The package as it installs from what git tracks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("yes", "FAIRSEQ_LRN_CUDA must be 0, 1 or not set, but is 'yes'"),
        pytest.param(
            "1",
            "lacks: a PyTorch built for CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch for the CPU"),
        ),
    ],
)
def test_what_keeps_cuda_from_being_built(wish, words):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FAIRSEQ_LRN_CUDA": wish},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode != 0
    assert words in done.stderr
