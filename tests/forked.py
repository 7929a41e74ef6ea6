"""Python's commands in forks of a process that has imported fairseq (warm.py)."""

import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence


def execute(words: List[str], input: str, output: str, before: str) -> None:
    """Become ``words``: the script ``words[0]``, from the file ``input`` to the file ``output``.

    ``before`` is code to run first, in this process.
    """
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.stdin = open(input, encoding="utf-8")  # noqa: SIM115  stays open
    multiprocessing.set_start_method(None, force=True)  # Python's own choice, not that of this process
    exec(before, {})
    _become(words)


def _become(words: List[str]) -> None:
    """Run the script ``words[0]``, or the module ``words[1]`` after -m."""
    logging.root.handlers.clear()  # what importing fairseq set up
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))  # as Python does
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None:  # which Python 3.8's multiprocessing would take for a failure
            raise


class Popen(subprocess.Popen):
    """As subprocess.Popen; a command of Python's is a fork of this process."""

    def _execute_child(self, args: Sequence[Any], *rest: Any) -> None:
        script = find_script([str(word) for word in args])
        if script is None:
            super()._execute_child(args, *rest)
            return
        cwd, env = rest[4:6]
        pipes = read, _, _, written, _, errors = rest[9:15]
        process = multiprocessing.get_context("fork").Process(
            target=_run, args=(script, cwd, env, (read, written, errors))
        )
        process.start()
        self.pid = process.pid
        self._child_created = True
        self._close_pipe_fds(*pipes)


def find_script(words: List[str]) -> Optional[List[str]]:
    """Return a script, or -m and a module, and its arguments; None for what is no command of Python's."""
    if words[0] == sys.executable:
        return words[1:] if words[1] == "-m" or words[1].endswith(".py") else None
    path = Path(sys.executable).parent / words[0]
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline(200)
        if first.startswith(b"#!") and b"python" in first:
            return [str(path), *words[1:]]
    return None


def _run(words: List[str], cwd: Any, env: Optional[Dict[str, str]], streams: Sequence[int]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream, file in enumerate(streams):
        if file != -1:
            os.dup2(file, stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    _become(words)
