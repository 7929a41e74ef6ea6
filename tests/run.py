"""Make the project's environment, check the style and run the tests: python3 tests/run.py.

To run some tests only, name their files, or put pytest's options after --: python3 tests/run.py -- -k scan.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from environment import LOGS, PYTHON, alone, attempt, enter, run  # noqa: E402


def check_style() -> None:
    """Exit where a file is not formatted, or a tool finds a fault."""
    folders = (ROOT / "fairseq_lrn" / "csrc", ROOT / "tests" / "csrc")
    sources = [
        p for folder in folders for p in folder.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")
    ]
    for title, command in (
        ("Lint", ["ruff", "check", "."]),
        ("Formatting", ["ruff", "format", "--check", "."]),
        ("Formatting of C++", ["clang-format", "--dry-run", "--Werror", *sources]),
        ("Types", ["mypy"]),
    ):
        log = LOGS / f"{title.lower().replace(' ', '-')}.log"
        attempt(title, lambda command=command, log=log: run(command, log))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--all", action="store_true", help="also check fairseq's own models beside lrn")
    parser.add_argument("--style", action="store_true", help="check the style only")
    parser.add_argument("pytest", nargs="*", help="files of tests, or pytest's options after --")
    dashes = [*sys.argv, "--"].index("--")
    arguments = enter(parser, sys.argv[1:dashes])
    os.chdir(ROOT)
    with alone("style"):
        check_style()
    if arguments.style:
        sys.exit()
    print("\n== Tests", flush=True)
    # A file's tests share what they have trained, so they stay together; conftest.py has their order.
    options = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    options += ["--durations", "10", *(["--all"] if arguments.all else [])]
    os.execv(PYTHON, [str(PYTHON), "-m", "pytest", *options, *arguments.pytest, *sys.argv[dashes + 1 :]])
