"""A recipe of examples/, run as a user would, its commands as forks of a process that has imported fairseq."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# the recipes' commands, but those that are no Python
FORKED = f"""
import os, sys
sys.path[:0] = [{str(EXAMPLES)!r}, {str(ROOT / "tests")!r}]
os.chdir({{folder!r}})
os.environ.update({{variables!r}})
import forked, recipe
recipe.call = forked.call
"""


class Recipe:
    """The recipe ``script`` of examples/, run in the folder ``cwd``, with the fixture ``start``.

    ``words`` come before those of a call. A call returns what is printed, the table last.
    """

    def __init__(self, start, cwd, script, *words):
        self.begin, self.cwd, self.script, self.words = start, cwd, EXAMPLES / script, words

    def start(self, *words, **variables):
        before = FORKED.format(folder=str(self.cwd), variables={"PYTHONPATH": str(ROOT), **variables})
        return self.begin(self.script, *self.words, *words, before=before)

    def __call__(self, *words, status=0, **variables):
        process = self.start(*words, **variables)
        process.join()
        output = process.output.read_text(encoding="utf-8")
        assert process.exitcode == status, output[-4000:]
        return output

    def refused(self, *words, **variables):
        """The last line, the one sentence with which the recipe ends."""
        output = self(*words, status=1, **variables)
        assert "Traceback" not in output, output[-4000:]
        return output.rstrip("\n").split("\n")[-1]


def table(output):
    """The rows of the table, the header first."""
    rows = [line for line in output.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "---" not in row]


def lines(path):
    return path.read_bytes().decode("utf-8").split("\n")[:-1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


def times(folder):
    """When each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
