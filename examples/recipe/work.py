"""The work folder of a recipe: its manifest and lock, its steps and the commands that they run."""

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from .text import Refused, digest, say

ROOT = Path(__file__).resolve().parents[2]
MANIFEST, LOCK, PART = "recipe.json", ".lock", ".part"


def package() -> Path:
    """Return the folder of the installed package, or of this checkout's."""
    spec = importlib.util.find_spec("fairseq_lrn")
    return Path(spec.origin).resolve().parent if spec and spec.origin else ROOT / "fairseq_lrn"


def environment() -> Dict[str, str]:
    """Return the environment variables of commands, which run in other folders than this program."""
    kept = {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # or lines of two streams would mix in a log
        # keeps the memory of large tensors from one batch to the next; glibc would return it and zero it
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    }
    found = [str(package().parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    paths = [os.path.abspath(path) for path in found]
    return {**kept, **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def program(name: str) -> str:
    """Return the command ``name`` from this Python's environment, or from the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Refused(f"there is no command {name} on the path or beside {sys.executable}: install it")
    return name if shutil.which(name) == found else found


def call(words: Sequence[str], cwd: Path, log: Path, env: Dict[str, str], lock: Optional[int] = None) -> int:
    """Run a command, append its output to ``log``, and return its exit status.

    It holds the ``lock`` as long as it runs, even if this program is killed.
    """
    with open(log, "ab") as file:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


class Work:
    """A folder that belongs to one recipe, with a manifest of its files and of their inputs.

    Raises :class:`Refused` if the folder is neither new nor this recipe's. Nothing is written before
    :meth:`open`. Files that are not in the manifest are never overwritten.
    """

    def __init__(self, folder: Path, recipe: str, dry: bool) -> None:
        self.folder, self.recipe, self.dry, self.lock = folder.absolute(), recipe, dry, None
        self.finished = False  # whether no step may be done
        self.read()

    def read(self) -> None:
        """Read the manifest, or start one."""
        self.state: Dict[str, Any] = {"recipe": self.recipe, "steps": {}, "hashes": {}}
        if not os.path.lexists(self.folder):
            return
        if not self.folder.is_dir():
            raise Refused(f"{self.folder} is not a folder: choose another --work")
        names = set(os.listdir(self.folder)) - {LOCK, f"{MANIFEST}.new"}
        if not names:
            return
        try:
            state = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            found = state["recipe"]
            assert set(state) == set(self.state)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise Refused(
                f"{self.folder} is not empty and has no manifest of a recipe: choose another --work"
            ) from error
        if found != self.recipe:
            raise Refused(f"{self.folder} belongs to the recipe {found}: choose another --work")
        self.state = state

    def open(self) -> None:
        """Make the folder and lock it as long as this process, or one of its commands, runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        for patience in range(20, -1, -1):  # what an ended run has started may take a moment to end
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not patience:
                    raise Refused(f"another run is at work in {self.folder}: wait until it ends") from error
                time.sleep(0.1)
        self.read()
        if not (self.folder / MANIFEST).exists():
            self.save()
            (self.folder / ".gitignore").write_text("*\n")
        shutil.rmtree(self.folder / PART, ignore_errors=True)

    @property
    def steps(self) -> Dict[str, Any]:
        return self.state["steps"]

    def save(self) -> None:
        new = self.folder / f"{MANIFEST}.new"
        with open(new, "w", encoding="utf-8") as file:
            json.dump(self.state, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / MANIFEST)

    def hash(self, name: str) -> Optional[str]:
        """Return the hash of a file here, or None without it. Read it again if size or time changed."""
        path = self.folder / name
        if not path.is_file():
            return None
        stat = path.stat()
        size, modified, known = self.state["hashes"].get(name, (None, None, None))
        if (size, modified) != (stat.st_size, stat.st_mtime_ns):
            known = digest(path)
            self.state["hashes"][name] = [stat.st_size, stat.st_mtime_ns, known]
        return known

    def intact(self, step: str) -> bool:
        return all(self.hash(name) == value for name, value in self.outputs(step).items())

    def runs(self) -> List[str]:
        """Return the names of runs that have checkpoints."""
        names = [step.split("/")[1] for step in self.steps if step.endswith("/train")]
        return [name for name in names if any((self.folder / "runs" / name).glob("checkpoint*.pt"))]

    def run(self, words: Sequence[Any], log: Path, cwd: str = ".") -> None:
        """Run a command in the folder ``cwd``, with paths relative to it. Print it, and its last lines if it
        fails."""
        words = [program(str(words[0])), *map(str, words[1:])]
        folder = self.folder / cwd
        say(f"$ cd {shlex.quote(str(folder))} && {' '.join(map(shlex.quote, words))}")
        if self.dry:
            return
        status = call(words, folder, log, environment(), self.lock)
        if status != 0:
            with open(log, encoding="utf-8", errors="replace") as file:
                say(
                    "".join(
                        f"  | {line.rstrip()}\n" for line in file.read().split("\n")[-20:] if line.strip()
                    )
                )
            raise Refused(f"{Path(words[0]).name} ended with {status}, see {log}")

    def step(
        self,
        name: str,
        settings: Dict[str, Any],
        inputs: Dict[str, Optional[str]],
        make: Callable[[Path], None],
        commands: Sequence[Sequence[Any]] = (),
        again: bool = False,
    ) -> None:
        """Let ``commands``, and then ``make``, write files to a folder, then move them here.

        A step is skipped if it was done with the same settings and inputs and all its files exist. If trained
        runs depend on its files, and these would change, this refuses.

        Args:
            name: of the step; for a run RUNS/NAME/STEP
            settings: of the step, to be compared and named
            inputs: hashes of the files that it reads, by name
            make: called with the folder, in which files have the same relative paths as here
            commands: words of commands, run here; their output goes to logs/STEP.log in the folder
            again: do it even if it was done before
        """
        entry = self.steps.get(name)
        same = entry is not None and (entry["settings"], entry["inputs"]) == (settings, inputs)
        if same and not again and self.intact(name):
            say(f"== {name}: done before")
            return
        if self.finished:
            raise Refused(f"{name} was made from other files than {self.folder} has: run its recipe again")
        say(f"== {name}")
        part = self.folder / PART
        log = part / log_name(name)
        if not self.dry:
            shutil.rmtree(part, ignore_errors=True)
            for path in (log, part / name):
                path.parent.mkdir(parents=True, exist_ok=True)
        for words in commands:
            self.run(words, log)
        if self.dry:
            return
        make(part)
        made = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        outputs = {file: digest(part / file) for file in made if not file.endswith(".log")}
        logs = [file for file in made if file.endswith(".log")]
        if entry is not None and entry["outputs"] != outputs and not name.startswith("runs/") and not again:
            runs = self.runs()
            if runs:
                changed = difference(entry, {"settings": settings, "inputs": inputs})
                raise Refused(
                    f"{self.folder} has runs ({', '.join(runs)}) that were trained before {changed}: choose "
                    "another --work, or remove it"
                )
        owned = {
            file for other in self.steps.values() for file in [*other["outputs"], *other.get("logs", ())]
        }
        for file in made:
            if file not in owned and os.path.lexists(self.folder / file):
                raise Refused(f"{self.folder / file} exists, but is not this recipe's: move it away")
        for file, value in self.outputs(name).items():
            if file not in outputs and self.hash(file) == value:
                (self.folder / file).unlink()
        for file in (entry or {}).get("logs", ()):
            if file not in made:  # or a later step that makes it would take it for another's
                (self.folder / file).unlink(missing_ok=True)
        self.steps[name] = {"settings": settings, "inputs": inputs, "outputs": outputs, "logs": logs}
        self.save()
        for file in made:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / file, self.folder / file)
        for file in outputs:
            self.hash(file)
        self.save()
        shutil.rmtree(part)

    def outputs(self, step: str) -> Dict[str, Optional[str]]:
        """Return the hashes of the files that a step made, or in a dry run would make."""
        return dict(self.steps[step]["outputs"]) if step in self.steps else {}


def log_name(step: str) -> str:
    return f"logs/{step.replace('/', '.')}.log"


def difference(old: Dict[str, Any], new: Dict[str, Any]) -> str:
    """Return the differences: settings by name and value, inputs by name."""

    def flat(tree: Any, prefix: str = "") -> Dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix[:-1]: tree}
        return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}{name}.").items()}

    said = []
    before, now = flat(old["settings"]), flat(new["settings"])
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            said.append(f"{name} became {now.get(name)} (it was {before.get(name)})")
    for name in sorted({*old["inputs"], *new["inputs"]}):
        if old["inputs"].get(name) != new["inputs"].get(name):
            said.append(f"{name} changed")
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    return ", ".join(said[:3]) + more if said else "the files that it made changed"
