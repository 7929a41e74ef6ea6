"""A recipe of examples/, run as a user would."""

import os
import subprocess
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Recipe:
    """Scripts of ``folder`` in examples/, run in the folder ``cwd``, writing to work/ there.

    ``settings`` are variables; a call may give others, and then only those of the same name differ.
    """

    def __init__(self, folder, cwd, **settings):
        self.folder, self.cwd, self.work = EXAMPLES / folder, cwd, cwd / "work"
        self.settings = {"PYTHONWARNINGS": "ignore", "WORK": "work", **settings}

    def __call__(self, script, *words, **settings):
        env = {**os.environ, **self.settings, **settings}
        command = ["bash", str(self.folder / script), *words]
        return subprocess.run(command, cwd=self.cwd, env=env, capture_output=True, text=True)


def lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]
