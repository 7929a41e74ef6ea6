"""Shared by the README's two commands: a virtual environment, and steps that print what they do.

It needs only Python's standard library.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Deque, Iterable, Iterator, Optional, Sequence, Union

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fairseq_lrn"
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fairseq_lrn.stamp"
LOGS = ROOT / "build" / "environment"
BUILD_TOOLS = ("torch", "numpy", "cython", "setuptools", "setuptools-scm", "wheel", "ninja")


class Failed(Exception):
    """A command that did not exit with 0."""


def run(command: Sequence[object], log: Path, show: str = ".+") -> None:
    """Run ``command`` in the environment. Write its output to ``log`` and print lines that match ``show``.

    Raises :class:`Failed`, with the last lines of output, if the command cannot start or does not exit with
    0.
    """
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    path = os.pathsep.join((str(PYTHON.parent), os.environ.get("PATH", os.defpath)))
    started = time.monotonic()
    last: Deque[str] = deque(maxlen=20)
    try:
        process = subprocess.Popen(
            words,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise Failed(f"{words[0]} cannot be started: {error}") from error
    with process, log.open("w", buffering=1, encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            last.append(line)
            found = re.search(show, line)
            if found:
                print(f"{time.monotonic() - started:5.0f} s  {found.group()[:110]}", flush=True)
    if process.returncode != 0:
        lines = "".join(f"  | {line.rstrip()}\n" for line in last)
        raise Failed(f"{words[0]} exited with {process.returncode}. The last lines of {log}:\n{lines}")


def attempt(title: str, work: Callable[[], None]) -> None:
    """Call ``work``. If it fails, exit with a message that names the step ``title`` and the reason."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted in step '{title}'; the same command goes on from there.")
    except Exception as error:
        sys.exit(f"\nStep '{title}' failed: {error if isinstance(error, (Failed, OSError)) else repr(error)}")
    print(f"== {title}: done in {time.monotonic() - started:.0f} s", flush=True)


def digest(inputs: Iterable[Union[str, Path]]) -> str:
    """Return a hash of strings and of the contents of files and folders."""
    total = hashlib.sha256()
    for item in inputs:
        for path in sorted(item.rglob("*")) if isinstance(item, Path) and item.is_dir() else [item]:
            content = path.read_bytes() if isinstance(path, Path) and path.is_file() else str(path).encode()
            total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def step(
    title: str,
    result: Path,
    inputs: Iterable[Union[str, Path]],
    work: Callable[[], None],
    resumes: bool = False,
) -> None:
    """Let ``work`` fill the folder ``result``, unless it is complete and was made from the same ``inputs``.

    Files of an unfinished ``work`` are removed first, unless it ``resumes`` and the inputs are the same.
    Exits as :func:`attempt` does.
    """
    key, begun, done = digest(inputs), result / ".begun", result / ".done"
    if done.exists() and done.read_text() == key:
        print(f"\n== {title}: done before, in {result}", flush=True)
        return

    def begin() -> None:
        if not (resumes and begun.exists() and begun.read_text() == key):
            shutil.rmtree(result, ignore_errors=True)
            result.mkdir(parents=True)
            begun.write_text(key)
        work()

    attempt(title, begin)
    begun.replace(done)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Wait until no other process is in this block. Exit if ``LOGS`` cannot be written."""
    path = LOGS / f"{name}.lock"
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process is at work here; waiting for it to end ({path})", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def enter(parser: argparse.ArgumentParser, words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return the arguments in ``words``, or the script's, inside the environment.

    If the script runs outside, it runs again inside. An environment that this tree does not match is
    completed. A ``.venv`` of the user is extended, not replaced.
    """
    arguments = parser.parse_intermixed_args(words)
    if sys.version_info < (3, 11):
        sys.exit(f"{parser.prog} needs Python 3.11 or later, but this is {sys.version.split()[0]}")
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted(PACKAGE.glob("csrc/*"))]
    key = digest([Path(__file__), CONSTRAINTS, *sources])
    if not complete(key):
        with alone("environment"):
            if not complete(key):  # what the other process may have seen to
                install(key)
    if not os.path.samefile(sys.prefix, VENV):
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    return arguments


def complete(key: str) -> bool:
    """Whether the environment exists and was made for this folder and ``key``."""
    made = STAMP.read_text().split("\n") if STAMP.exists() else []
    return made == [str(ROOT), key] and PYTHON.exists() and any(PACKAGE.glob("_C.*"))


def install(key: str) -> None:
    """Make the environment, or complete it."""
    made = STAMP.read_text().split("\n") if STAMP.exists() else []
    if made[:1] != [str(ROOT)] or not PYTHON.exists():
        # One that was made for another folder still points there.
        command = [sys.executable, "-m", "venv", *(["--clear"] if made else []), VENV]
        attempt("Make a virtual environment", lambda: run(command, LOGS / "venv.log"))
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--constraint", CONSTRAINTS]
    show = r"^\s*(Collecting|Downloading|Building|Installing|Successfully|ERROR).*"
    tools = [*pip, *BUILD_TOOLS]
    attempt("Install PyTorch and build tools", lambda: run(tools, LOGS / "tools.log", show))
    # Without isolation: fairseq's build would otherwise download a PyTorch of its own.
    rest = [*pip, "--no-build-isolation", "--editable", f"{ROOT}[tagging,plot,dev]"]
    title = "Install fairseq, this project and the rest; compiling takes some minutes"
    attempt(title, lambda: run(rest, LOGS / "rest.log", show))
    STAMP.write_text(f"{ROOT}\n{key}")
