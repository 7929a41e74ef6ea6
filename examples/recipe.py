"""What all recipes share: their options, their work folder with its manifest, their steps, training, the table.

    python RECIPE.py [--work DIR] [--data DIR] [--dry-run] [OPTION=VALUE ...]

A recipe is a subclass of :class:`Recipe` and, beside it, a YAML file with all its settings. Those at the top are
the recipe's own, those in groups are fairseq's, as ``fairseq-hydra-train`` takes them.
"""

import argparse
import difflib
import fcntl
import fnmatch
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
MANIFEST, LOCK, PART = "recipe.json", ".lock", ".part"
LOCAL = re.compile(r"(path|dir|file|model)$")  # options that name a file
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a part of a compressed file raises
SET_BY_RECIPE = {
    "common.user_dir": "it is this package",
    "task.data": "give --data, the folder with the text",
    "task.num_classes": "the training labels are counted",
    "task.source_lang": "the recipe has its languages",
    "task.target_lang": "the recipe has its languages",
    "checkpoint.save_dir": "give --work and run=NAME",
    "model._name": "give models=NAME",
}


class Refused(Exception):
    """What the user must know, in one sentence."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Text


class Line(NamedTuple):
    """A line of a file, without its end, and where it is."""

    path: Path
    number: int
    text: str

    def refuse(self, reason: str) -> Refused:
        return Refused(f"{self.path}, line {self.number}: {reason}")


def lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a UTF-8 file, compressed by gzip or not; they end with ``\n`` or ``\r\n``.

    A byte order mark is left out, and so is the last line where it has not even an end.
    """
    try:
        with open(path, "rb") as raw:
            magic = raw.read(2)
        with (gzip.open if magic == b"\x1f\x8b" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                if line.endswith(b"\n"):
                    line = line[: -2 if line.endswith(b"\r\n") else -1]
                elif not line:
                    return
                yield Line(path, number, line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"{path}, line {number}: this is not UTF-8 ({error.reason})") from error
    except BROKEN as error:
        raise Refused(f"{path} is not a whole gzip file: {error}") from error


def blanks(text: str) -> str:
    """Replace each space, line separator or control character that Python counts as white space by a blank."""
    return re.sub(r"\s", " ", text)


def numbered(numbers: Sequence[int]) -> str:
    """Say which lines: the first ones, and how many in all."""
    some = ", ".join(str(number) for number in numbers[:3])
    return f"line {some}" if len(numbers) == 1 else f"lines {some}{', …' if len(numbers) > 3 else ''}"


def digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


# Commands


def package() -> Path:
    """Return the folder of the installed package, or else of this checkout's."""
    spec = importlib.util.find_spec("fairseq_lrn")
    return Path(spec.origin).resolve().parent if spec and spec.origin else ROOT / "fairseq_lrn"


def environment() -> Dict[str, str]:
    """Return the variables of commands, which run in other folders than this program."""
    kept = {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # or lines of two streams would mix in a log
        # keeps the memory of large tensors from one batch to the next; glibc would return it and zero it again
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    }
    found = [str(package().parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    paths = [os.path.abspath(path) for path in found]
    return {**kept, **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def program(name: str) -> str:
    """Return the command ``name`` of this Python's environment, or else of the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Refused(f"there is no command {name}: pip install {name.split('-')[0]}")
    return name if shutil.which(name) == found else found


def call(words: Sequence[str], cwd: Path, log: Path, env: Dict[str, str], lock: Optional[int] = None) -> int:
    """Run a command, its output appended to ``log``, and return its exit status.

    It holds the ``lock`` as long as it lives, even where this program is killed.
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


# Settings


def read_option(word: str) -> Tuple[str, Any]:
    """Split OPTION=VALUE; the value is read as in a YAML file, so that a comma or a blank may be in it."""
    option, equals, value = word.partition("=")
    option = option.lstrip("+")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", option):
        raise Refused(f"the argument {word!r} must be OPTION=VALUE, as model.dropout=0.2")
    try:
        read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
    except Exception as error:
        raise Refused(f"{option} is {value!r}, which is no value of a YAML file") from error
    if set(read) != {"value"}:
        raise Refused(f"{option} is {value!r}, which is no value of a YAML file")
    return option, read["value"]


def own_value(name: str, value: Any, default: Any) -> Any:
    """Return a recipe's own setting as the type that the YAML file's ``default`` has."""
    kind = type(default)
    if isinstance(default, list) and value is not None:
        values = value if isinstance(value, list) else str(value).split(",")
        return list(dict.fromkeys(str(x).strip() for x in values))
    if default is None:
        return None if value is None else value if isinstance(value, list) else str(value)
    if kind is str and not isinstance(value, (list, dict)):
        return str(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        kinds = {int: "a whole number", bool: "true or false", float: "a number"}
        raise Refused(f"{name} is {value!r}, but must be {kinds.get(kind, 'text')}")
    if kind in (int, float) and value < 0:
        raise Refused(f"{name} is {value}, but must not be negative")
    return value


def near(name: str, known: Iterable[str]) -> str:
    """Say what may have been meant by ``name``."""
    found = difflib.get_close_matches(name, list(known), 3)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def resolve(settings: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Check fairseq's groups of settings, and complete the model as ``fairseq-train --arch`` does.

    ``fairseq-hydra-train`` itself passes over options that the model does not have, and over what an
    architecture stands for.
    """
    try:
        from fairseq.dataclass.configs import FairseqConfig
        from fairseq.dataclass.utils import _set_legacy_defaults
        from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
        from fairseq.registry import REGISTRIES
        from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
        from fairseq.utils import import_user_module

        import_user_module(argparse.Namespace(user_dir=str(package())))
    except ImportError as error:
        raise Refused(f"fairseq and this package must be installed: {error}") from error

    resolved = {}
    for group, options in settings.items():
        if group not in FairseqConfig.__dataclass_fields__:
            names = FairseqConfig.__dataclass_fields__
            raise Refused(f"there is no group of options {group}{near(group, names)}")
        node, known = FairseqConfig.__dataclass_fields__[group].type, None
        name = options.get("_name")
        if group == "model":
            model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
            if model is None:
                raise Refused(f"there is no model {name}{near(str(name), ARCH_MODEL_REGISTRY)}")
            node = getattr(model, "__dataclass", None)
            if node is None:
                parser = argparse.ArgumentParser(allow_abbrev=False)
                model.add_args(parser)
                # such a model also reads what are the task's options, as fairseq-train has one list of all
                known = {action.dest for action in parser._actions} | {"criterion"}
                known |= set(TASK_DATACLASS_REGISTRY[settings["task"]["_name"]].__dataclass_fields__)
        elif node is Any:  # a choice of several, by name
            registry, nodes = TASK_REGISTRY, TASK_DATACLASS_REGISTRY
            if group != "task":
                registry, nodes = REGISTRIES[group]["registry"], REGISTRIES[group]["dataclass_registry"]
            if name not in registry:
                raise Refused(f"{group}._name is {name}, which fairseq does not know{near(str(name), registry)}")
            node = nodes.get(name)
        known = known or (set(node.__dataclass_fields__) if node else set(options))
        values = {}
        for option, value in options.items():
            if option not in {*known, "_name"}:
                raise Refused(f"there is no option {group}.{option}{near(option, known)}")
            if node is not None and option != "_name":
                if "List[" in str(node.__dataclass_fields__[option].type) and isinstance(value, (int, float)):
                    value = [value]
                try:
                    OmegaConf.merge(OmegaConf.structured(node), {option: value})
                except Exception as error:
                    reason = str(error).split("\n")[0]
                    raise Refused(f"{group}.{option} is {value!r}: {reason}") from error
            values[option] = value
        if group == "model":
            namespace = argparse.Namespace(**values)
            ARCH_CONFIG_REGISTRY.get(name, lambda _: None)(namespace)
            if node is None:
                _set_legacy_defaults(namespace, model)
                # fairseq's lstm looks for it among its own options
                vars(namespace).setdefault("criterion", settings["criterion"]["_name"])
            values = vars(namespace)
        resolved[group] = values
    return resolved


# The work folder


class Work:
    """A folder that belongs to one recipe, with a manifest of what it holds and of what that was made from.

    Raises :class:`Refused` where the folder is neither new nor this recipe's. Nothing is written before
    :meth:`open`, and never a file that is there without being in the manifest.
    """

    def __init__(self, folder: Path, recipe: str, dry: bool) -> None:
        self.folder, self.recipe, self.dry, self.lock = folder.absolute(), recipe, dry, None
        self.read()

    def read(self) -> None:
        """Read the manifest, or begin one."""
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
        """Make the folder and lock it as long as this process, or a command of its, is alive."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"another run is at work in {self.folder}: wait until it ends") from error
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
        """Return the hash of a file here, None where it is not; read again where size or time changed."""
        path = self.folder / name
        if not path.is_file():
            return None
        stat = path.stat()
        size, time, known = self.state["hashes"].get(name, (None, None, None))
        if (size, time) != (stat.st_size, stat.st_mtime_ns):
            known = digest(path)
            self.state["hashes"][name] = [stat.st_size, stat.st_mtime_ns, known]
        return known

    def intact(self, step: str) -> bool:
        outputs = self.steps[step]["outputs"]
        return all(self.hash(name) == value for name, value in outputs.items())

    def runs(self) -> List[str]:
        """Return the names of runs that have checkpoints."""
        names = [step.split("/")[1] for step in self.steps if step.endswith("/train")]
        return [name for name in names if any((self.folder / "runs" / name).glob("checkpoint*.pt"))]

    def run(self, words: Sequence[Any], log: Path, cwd: str = ".") -> None:
        """Run a command in the folder ``cwd``, by paths relative to it; print it, and its end if it fails."""
        words = [program(str(words[0])), *map(str, words[1:])]
        folder = self.folder / cwd
        say(f"$ cd {shlex.quote(str(folder))} && {' '.join(map(shlex.quote, words))}")
        if self.dry:
            return
        status = call(words, folder, log, environment(), self.lock)
        if status != 0:
            with open(log, encoding="utf-8", errors="replace") as file:
                say("".join(f"  | {line.rstrip()}\n" for line in file.read().split("\n")[-20:] if line.strip()))
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
        """Have ``commands``, and then ``make``, write files to a folder, then move them here.

        It is left out where it was done with the same settings and inputs and all it made is there. What it made
        stays where trained runs depend on it: if it would come out differently, this refuses.

        Args:
            name: of the step; a run's are RUNS/NAME/STEP
            settings: what it depends on, to be compared and named
            inputs: hashes of what it reads, by name
            make: called with the folder, in which files have the same relative paths as here
            commands: words of commands, run here; what they print goes to logs/STEP.log in the folder
            again: whatever was done before
        """
        entry = self.steps.get(name)
        same = entry is not None and (entry["settings"], entry["inputs"]) == (settings, inputs)
        if same and not again and self.intact(name):
            say(f"== {name}: done before")
            return
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
                    f"{self.folder} has runs ({', '.join(runs)}) that were trained before {changed}: choose another "
                    "--work, or remove it"
                )
        owned = {file for other in self.steps.values() for file in [*other["outputs"], *other.get("logs", ())]}
        for file in made:
            if file not in owned and os.path.lexists(self.folder / file):
                raise Refused(f"{self.folder / file} is there and not the recipe's: move it away")
        for file, value in (entry or {"outputs": {}})["outputs"].items():
            if file not in outputs and self.hash(file) == value:
                (self.folder / file).unlink()
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
        """Return the hashes of what a step made; in a dry run of what it would be asked for."""
        return dict(self.steps.get(step, {"outputs": {}})["outputs"])


def log_name(step: str) -> str:
    return f"logs/{step.replace('/', '.')}.log"


def written(path: Path) -> Iterator[str]:
    r"""Yield the lines of a file that a recipe wrote; each ends with ``\n``."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def difference(old: Dict[str, Any], new: Dict[str, Any]) -> str:
    """Say what is not the same: settings by name and value, inputs by name."""

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


# Recipes


class Run(NamedTuple):
    """A training: its name and its settings for ``fairseq-hydra-train``."""

    name: str
    settings: Dict[str, Dict[str, Any]]

    @property
    def folder(self) -> str:
        return f"runs/{self.name}"


class Recipe:
    """The steps of one recipe; a subclass says what is special about its data.

    Attributes:
        script: the recipe's file; its YAML file has the same name
        header: of the table
    """

    script = ""
    header: Sequence[str] = ()

    def __init__(self, words: Sequence[str]) -> None:
        self.name = Path(self.script).stem
        self.defaults = OmegaConf.to_container(
            OmegaConf.load(Path(self.script).with_suffix(".yaml")), resolve=False
        )
        own = [name for name, value in self.defaults.items() if not isinstance(value, dict)]
        module = sys.modules[type(self).__module__]
        parser = argparse.ArgumentParser(
            prog=Path(self.script).name,
            usage="%(prog)s [--work DIR] [--data DIR] [--dry-run] [OPTION=VALUE ...]",
            description=(module.__doc__ or "").split("\n")[0],
            epilog=f"OPTION is one of {', '.join(own)}, or GROUP.OPTION of fairseq: see {self.name}.yaml.",
            allow_abbrev=False,
        )
        parser.add_argument("--work", type=Path, help=f"folder to write to (default: {self.work_name()})")
        parser.add_argument("--data", type=Path, help="folder with the data")
        parser.add_argument("--dry-run", action="store_true", help="print the commands and change nothing")
        parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="another setting than the YAML's")
        args = parser.parse_intermixed_args(words)
        self.data, self.source, self.options = args.data, args.data, {}
        self.config = {name: self.defaults[name] for name in own}
        for option, value in map(read_option, args.options):
            if "." in option:
                if option in SET_BY_RECIPE:
                    raise Refused(f"{option} is set by the recipe: {SET_BY_RECIPE[option]}")
                if isinstance(value, str) and LOCAL.search(option):
                    path = os.path.abspath(os.path.expanduser(value))
                    if os.path.exists(path):
                        value = path
                    elif option.endswith("path"):
                        raise Refused(f"{option} is {value}, which is not there")
                self.options[option] = value
            elif option in self.config:
                self.config[option] = own_value(option, value, self.defaults[option])
            else:
                raise Refused(f"there is no setting {option}{near(option, own)}")
        self.check()
        if self.data is not None and not self.data.is_dir():
            raise Refused(f"--data {self.data} is not a folder")
        self.work = Work(args.work or Path(self.work_name()), self.name, args.dry_run)

    def check(self) -> None:
        """Refuse settings that cannot be."""

    def work_name(self) -> str:
        return self.name

    # Data

    def names(self) -> Sequence[str]:
        """Return the names of the files that are read."""
        raise NotImplementedError

    def urls(self) -> Sequence[str]:
        """Return what is fetched where there is no --data: these files, or archives with them."""
        return []

    def find(self, name: str) -> Path:
        """Return a file of the data, by its name with or without .gz."""
        for path in (self.source / name, self.source / f"{name}.gz"):
            if path.is_file():
                return path
        raise Refused(f"there is neither {name} nor {name}.gz in {self.source}")

    def files(self) -> Dict[str, Path]:
        """Return the files of --data, by name; none where they are to be fetched."""
        if self.data is None:
            if not self.urls():
                raise Refused(f"give --data, the folder with {', '.join(self.names())}")
            return {}
        return {name: self.find(name) for name in self.names()}

    def text(self, settings: Dict[str, Any], make: Callable[[Path], None]) -> None:
        """Do the step "text": what ``make`` writes, of files that it finds."""
        inputs, urls = {name: digest(path) for name, path in self.files().items()}, list(self.urls())
        if self.data is None:
            settings = {**settings, "urls": urls}
            done = self.work.steps.get("text")
            if not (done and done["settings"] == settings and self.work.intact("text")):
                for url in urls:
                    self.fetch(url)

        def made(part: Path) -> None:
            if self.data is None:
                self.source = self.unpack(part)
            make(part)
            shutil.rmtree(part / "unpacked", ignore_errors=True)

        self.work.step("text", settings, inputs, made)

    def fetch(self, url: str) -> None:
        """Download a file to download/; what is compressed must be whole."""
        name = f"download/{url.rsplit('/', 1)[1]}"
        words = ["curl", "-fsSL", "--retry", "3", "--create-dirs", "-o", f"{PART}/{name}", url]

        def check(part: Path) -> None:
            broken: Any = None
            try:
                if name.endswith(".zip"):
                    broken = zipfile.ZipFile(part / name).testzip()
                elif name.endswith("gz"):
                    with gzip.open(part / name) as file:
                        while file.read(1 << 20):
                            pass
            except (*BROKEN, zipfile.BadZipFile) as error:
                broken = error
            if broken:
                raise Refused(f"{url} gave no whole archive: {broken}")

        self.work.step(name, {"url": url}, {}, check, [words])

    def unpack(self, part: Path) -> Path:
        """Take the files from the archives that were fetched, and return the folder where they are."""
        folder = part / "unpacked"
        folder.mkdir()
        for url in self.urls():
            path = self.work.folder / "download" / url.rsplit("/", 1)[1]
            if path.suffix == ".zip":
                archive = zipfile.ZipFile(path)
                members = ((member, archive.open) for member in archive.namelist())
            elif path.suffix == ".tgz":
                archive = tarfile.open(path)
                members = ((member.name, lambda _, m=member: archive.extractfile(m)) for member in archive)
            else:
                shutil.copy(path, folder)
                continue
            for member, open_member in members:
                if member.rsplit("/", 1)[-1] in self.names():
                    with open_member(member) as source, open(folder / member.rsplit("/", 1)[-1], "wb") as target:
                        shutil.copyfileobj(source, target)
            archive.close()
        return folder

    def choose(self, name: str, choices: Iterable[str]) -> None:
        if self.config[name] not in choices:
            raise Refused(f"{name} is {self.config[name]}, but must be {' or '.join(choices)}")

    # Runs

    def run(self, model: str) -> Run:
        """Return the run of ``model``, one of the YAML's architectures, or another of fairseq's if it has "*"."""
        architectures = self.defaults["architectures"]
        known = [pattern for pattern in architectures if fnmatch.fnmatchcase(model, pattern)]
        if not known:
            raise Refused(f"models has {model}, but must be of {', '.join(architectures)}")
        values = architectures[model if model in architectures else known[0]] or {}
        tree = OmegaConf.create({k: v for k, v in self.defaults.items() if isinstance(v, dict)})
        del tree["architectures"]
        tree.model = OmegaConf.merge({"_name": model}, tree.model, values)
        for option, value in self.options.items():
            group, _, name = option.partition(".")
            if group == "model" and name in values and name in ("cell", "_name"):
                raise Refused(f"{option} is set by the recipe: give models=NAME")
            tree = OmegaConf.merge(tree, {group: {name: value}})
        name = model
        if self.config["run"] is not None:
            name = str(self.config["run"])
            if len(self.config["models"]) > 1:
                name = f"{name}-{model}"
        if not re.fullmatch(r"[^./\s][^/\n\r]*", name):
            raise Refused(f"run is {name!r}, but must be the name of a folder that begins with no dot or blank")
        return Run(name, OmegaConf.to_container(tree, resolve=True))

    def training(self, run: Run) -> Dict[str, Dict[str, Any]]:
        """Return the settings of fairseq-hydra-train, without those that only the recipe's other steps read."""
        return {group: options for group, options in run.settings.items() if group != "generation"}

    def train(self, run: Run, inputs: Dict[str, Optional[str]]) -> None:
        """Train, or go on, by fairseq-hydra-train in the run's folder; never with other settings than it began."""
        work, step = self.work, f"{run.folder}/train"
        settings = self.training(run)
        local = {
            f"{group}.{option}": digest(Path(value))
            for group, options in settings.items()
            for option, value in options.items()
            if isinstance(value, str) and LOCAL.search(option) and os.path.isfile(value)
        }
        entry = {"settings": settings, "inputs": {**inputs, **local}, "outputs": {}}
        folder, last = work.folder / run.folder, f"{run.folder}/checkpoint_last.pt"
        begun = work.steps.get(step)
        if begun is None and folder.exists() and any(folder.iterdir()):
            raise Refused(f"{folder} is there and not the recipe's: give another run=NAME")
        if begun is not None and run.name in work.runs():
            if (begun["settings"], begun["inputs"]) != (entry["settings"], entry["inputs"]):
                raise Refused(
                    f"{folder} was trained before {difference(begun, entry)}: give another run=NAME or --work, or "
                    "remove it"
                )
            if begun["outputs"]:
                if work.hash(last) != begun["outputs"][last]:
                    raise Refused(f"{folder} was trained, but checkpoint_last.pt is another now: remove the folder")
                say(f"== {step}: done before")
                return
        say(f"== {step}")
        config = resolve(settings)
        config.setdefault("common", {})["user_dir"] = str(package())
        config["task"]["data"] = "../../bin"
        config.setdefault("checkpoint", {})["save_dir"] = "."
        config.setdefault("scoring", {"_name": "bleu"})  # as fairseq-train has it
        config["hydra"] = {"run": {"dir": "."}}
        words = ["fairseq-hydra-train", "--config-dir", ".", "--config-name", "train"]
        log = folder / "train.log"
        if not work.dry:
            work.steps[step] = entry
            work.save()
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(config), str(folder / "train.yaml"))
            say(f"   log: {log}")
        work.run(words, log, run.folder)
        if not work.dry:
            if not (work.folder / last).exists():
                raise Refused(f"training ended without a checkpoint, see {log}")
            entry["outputs"] = {last: work.hash(last)}
            work.save()

    def checkpoint(self, run: Run, name: str) -> Dict[str, Optional[str]]:
        """Return the hash of a run's checkpoint, by its path."""
        path = f"{run.folder}/{name}"
        if not self.work.dry and not (self.work.folder / path).is_file():
            raise Refused(f"{self.work.folder / path} is not there: remove the run's folder to train again")
        return {path: self.work.hash(path)}

    def log(self, run: Run, name: str = "train.log") -> str:
        path = self.work.folder / run.folder / name
        return path.read_text(encoding="utf-8", errors="replace")

    def parameters(self, run: Run) -> str:
        """Return the model's number of parameters, as its training's log has it."""
        return re.search(r"num. shared model params: ([\d,]*\d)", self.log(run))[1]

    def seconds(self, run: Run) -> str:
        """Return the median time of an update over the intervals of the training's log."""
        rates = [
            float(rate)
            for line in self.log(run).split("\n")
            if "train_inner" in line
            for rate in re.findall(r"ups=([\d.]+)", line)
        ]
        rate = statistics.median(rates) if rates else 0
        return f"{1 / rate:.3f}" if rate else "–"

    def scores(
        self,
        step: str,
        inputs: Dict[str, Optional[str]],
        commands: Sequence[Sequence[Any]],
        read: Callable[[Path, str], Any],
    ) -> Any:
        """Do a step that evaluates and return what ``read`` found in the folder that it gets and in the log's text.

        It is kept as STEP.json and not found again before the commands or what they read change.
        """

        def make(part: Path) -> None:
            log = (part / log_name(step)).read_bytes().decode("utf-8", "replace") if commands else ""
            (part / f"{step}.json").write_text(json.dumps(read(part, log)) + "\n")

        settings = {"commands": [" ".join(map(str, words)) for words in commands]}
        self.work.step(step, settings, inputs, make, commands)
        return None if self.work.dry else json.loads((self.work.folder / f"{step}.json").read_text())

    # Steps, each a subclass's

    def prepare(self) -> None:
        """Make text/ and bin/ from the data."""
        raise NotImplementedError

    def examine(self, run: Run) -> None:
        """Refuse to train on data that does not fit the run."""

    def evaluate(self, run: Run) -> Sequence[Any]:
        """Evaluate a trained run and return its row of the table; nothing in a dry run."""
        raise NotImplementedError

    def close(self) -> None:
        """Print what follows the table."""

    def execute(self) -> None:
        """Do all steps that are not done and print the table."""
        runs = [self.run(model) for model in self.config["models"]]
        if any(f"{run.folder}/train" not in self.work.steps for run in runs) or self.work.dry:
            for run in runs:
                resolve(run.settings)
        self.files()
        if not self.work.dry:
            self.work.open()
        self.prepare()
        rows = []
        bins = self.work.outputs("binarize")
        for run in runs:
            if not self.work.dry and not self.work.steps.get(f"{run.folder}/train", {"outputs": {}})["outputs"]:
                self.examine(run)
            self.train(run, bins)
            rows.append(self.evaluate(run))
        if not self.work.dry:
            self.table(rows)
            self.close()

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        for row in (self.header, ["---"] * len(self.header), *rows):
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def lengths(
    run: Run, split: str, path: Path, sizes: Iterable[int], limit: int, option: str, spare: bool = True
) -> None:
    """Say which examples of the training set are longer than the model reads; refuse those of other sets.

    Args:
        split: train, valid or test
        path, sizes: a file, and how many tokens each of its lines becomes, ``</s>`` included
        limit, option: the greatest size, and what sets it
        spare: fairseq leaves longer ones out of the training
    """
    long, total, longest = [], 0, 0
    for total, size in enumerate(sizes, 1):
        longest = max(longest, size)
        if size > limit:
            long.append(total)
    if long:
        said = (
            f"{len(long)} of {total} have more than {limit} tokens, which {option}={longest} would allow "
            f"({path}, {numbered(long)})"
        )
        if split != "train" or not spare or len(long) == total:
            raise Refused(f"{run.name} cannot read all of {split}: {said}")
        say(f"   {run.name} is trained without some of {split}: {said}")


def main(recipe: Callable[[Sequence[str]], Recipe]) -> None:
    """Run a recipe with the command line's words; end with one sentence where it cannot be done."""
    name = Path(sys.argv[0]).name

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        recipe(sys.argv[1:]).execute()
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on from there")
    except BrokenPipeError:
        sys.exit(1)
    except (Refused, OSError) as error:
        sys.exit(f"{name}: {error}")
