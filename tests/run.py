"""Check the style and run the tests in the project's environment: python3 tests/run.py [PYTEST'S OPTIONS]."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from environment import LOGS, PYTHON, attempt, enter, run  # noqa: E402

if __name__ == "__main__":
    enter()
    os.chdir(ROOT)
    attempt("Lint", lambda: run(["ruff", "check", "."], LOGS / "lint.log"))
    attempt("Formatting", lambda: run(["ruff", "format", "--check", "."], LOGS / "format.log"))
    print("\n== Tests", flush=True)
    # a file's tests share what they have trained, so they stay together
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    os.execv(PYTHON, [str(PYTHON), "-m", "pytest", *workers, *sys.argv[1:]])
