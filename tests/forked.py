"""A script in a fork of a process that has imported fairseq (warm.py)."""

import logging
import os
import runpy
import sys
from typing import List


def execute(words: List[str], input: str, output: str, before: str) -> None:
    """Become ``words``: the script ``words[0]``, from the file ``input`` to the file ``output``.

    ``before`` is code to run first, in this process.
    """
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.stdin = open(input, encoding="utf-8")  # noqa: SIM115  stays open
    logging.root.handlers.clear()  # what importing fairseq set up
    sys.argv = words
    exec(before, {})
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None:  # which Python 3.8's multiprocessing would take for a failure
            raise
