"""A script in a fork of a process that has imported fairseq: importing takes most of a command's time."""

import logging
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Dict, List, Optional

# torch._dynamo is what making an optimizer imports
IMPORTED = [
    "pytest",
    "torch._dynamo",
    "fairseq",
    "fairseq.trainer",
    "fairseq.sequence_generator",
    "hydra",
    "sacrebleu",
]


def execute(words: List[str], input: str, output: str, before: str) -> None:
    """Become ``words``: the script ``words[0]``, from the file ``input`` to the file ``output``.

    ``before`` is code to run first, in this process.
    """
    _become(words, input, os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), before)


def _become(words: List[str], input: str, written: int, before: str) -> None:
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.stdin = open(input, encoding="utf-8")  # noqa: SIM115  stays open
    logging.root.handlers.clear()  # what importing fairseq set up
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))  # as Python does
    exec(before, {})
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None:  # which Python 3.8's multiprocessing would take for a failure
            raise


def call(words: List[str], cwd: Path, log: Path, env: Dict[str, str], lock: Optional[int] = None) -> int:
    """As :func:`recipe.work.call`, in a fork of this process where the command is Python's."""
    script = words[1:] if words[0] == sys.executable else words
    beside = Path(sys.executable).parent / script[0]
    with open(log, "ab") as file:
        if not beside.exists():
            return subprocess.run(words, cwd=cwd, env=env, stdout=file, stderr=file).returncode
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                multiprocessing.set_start_method("fork", force=True)  # Python's own where nothing is said
                os.chdir(cwd)
                os.environ.clear()
                os.environ.update(env)
                _become([str(beside), *script[1:]], os.devnull, file.fileno(), "")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                multiprocessing.util._exit_function()  # ends workers that load data, as an end of Python does
                os._exit(status)
        try:
            _, ended = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            raise
        return os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else -os.WTERMSIG(ended)
