"""The package as it is built and installed from what git tracks, and what it says of itself."""

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

import fairseq_lrn
from fairseq_lrn import ops

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from fairseq_lrn.modules import LRN
LRN(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
import fairseq_lrn.models
print(torch.ops.fairseq_lrn.lrn_scan)
"""


@pytest.fixture(scope="module")
def tracked():
    """The names of the files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return [name for name in names.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree(tracked, tmp_path_factory):
    """A copy of what git tracks, as it is in this checkout."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """An sdist of the tree and a wheel made of that, on a machine without CUDA and without a compiler."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    for name in ("text/train.en", "text/notes.md", "runs/lrn/train.yaml", "runs/lrn/checkpoint_last.pt"):
        for work in (tree / "examples/work", tree / "examples/translation/work"):  # of recipes
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).touch()
    command = ["build", "--no-isolation", "--skip-dependency-check", "--outdir", folder, tree]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "CXX": "false", "FAIRSEQ_LRN_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "installed WITHOUT its compiled operators and will be slow" in done.stdout
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_an_sdist_holds_what_git_tracks(tracked, built):
    with tarfile.open(built[0]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in tracked if not name.startswith(".")} <= held
    assert "fairseq_lrn/csrc/lrn_cuda.cu" in held
    assert not [name for name in held if name.endswith((".so", ".pyc")) or "/work/" in name]


def test_a_wheel_holds_the_package(tracked, built):
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked if name.startswith("fairseq_lrn/") and "/csrc/" not in name}


def test_what_is_compiled_here_is_tracked():
    """So what this checkout was built from is what an sdist holds."""
    command = ["git", "ls-files", "--others", "--exclude-standard", "fairseq_lrn", "setup.py"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == ""


def test_modules_of_older_trees_are_not_installed(tree):
    old = tree / "build" / "lib" / "fairseq_lrn" / "models" / "old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "build/lib"]
    subprocess.run(command, cwd=tree, check=True, stderr=subprocess.DEVNULL)
    assert (old.parent / "lrn.py").exists() and not old.exists()


def test_the_wheel_installs(built, tmp_path):
    """With the operators that this checkout has compiled, as the wheel's are made of the same files."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, built[1]], check=True)
    for library in (ROOT / "fairseq_lrn").glob("_C*.so"):
        shutil.copy(library, site / "fairseq_lrn")

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
    assert python("-m", "fairseq_lrn", "--version") == fairseq_lrn.__version__
    # the warning of a package without its compiled operator would be an error
    assert "lrn_scan" in python("-W", "error:The compiled LRN operator", "-c", PROGRAM)


@pytest.fixture
def setup(monkeypatch):
    """Run setup.py; returns what it gives to setuptools."""

    def command():
        given = {}
        monkeypatch.setattr("setuptools.setup", given.update)
        monkeypatch.chdir(ROOT)
        runpy.run_path("setup.py")
        return given

    return command


@pytest.mark.parametrize("init", [True, False], ids=["package", "folder"])
def test_a_folder_named_fairseq_is_not_fairseq(setup, monkeypatch, tmp_path, init):
    """A clone of fairseq's repository, say."""
    (tmp_path / "fairseq").mkdir()
    if init:
        (tmp_path / "fairseq" / "__init__.py").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert any(name.startswith("fairseq") for name in setup()["install_requires"]) != init


def test_the_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("fairseq-lrn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert installed == fairseq_lrn.__version__


def check(capsys, monkeypatch):
    """Run ``python -m fairseq_lrn --check``; returns its exit status and output."""
    monkeypatch.setattr("sys.argv", ["fairseq_lrn", "--check"])
    status = 0
    try:
        runpy.run_module("fairseq_lrn", run_name="__main__")
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_check_says_what_is_compiled_and_that_it_agrees(capsys, monkeypatch):
    status, shown = check(capsys, monkeypatch)
    assert status == 0 and "all agree" in shown
    assert shown.count("differs from the definition by at most") == 4 if torch.cuda.is_available() else 2
    if hasattr(torch.ops.fairseq_lrn, "lrn_scan"):
        assert "lrn_scan, lrn_scan_backward" in shown
        assert "instruction set: " in shown
    else:
        assert "compiled operators: none" in shown


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_check_fails_where_a_pass_is_wrong(capsys, monkeypatch, wrong):
    def scan(projections, *rest, **options):
        if wrong == "backward":
            projections = projections * 1.01 - projections.detach() * 0.01
        return ops.lrn_scan_reference(projections, *rest, **options) + 0.01 * (wrong == "forward")

    monkeypatch.setattr(ops, "lrn_scan", scan)
    status, shown = check(capsys, monkeypatch)
    assert status == 1 and "THEY DO NOT AGREE" in shown


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
def test_what_keeps_cuda_from_being_built(setup, monkeypatch, wish, words):
    monkeypatch.setenv("FAIRSEQ_LRN_CUDA", wish)
    with pytest.raises(SystemExit, match=words):
        setup()
