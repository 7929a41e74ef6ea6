"""Shared by all recipes: options, steps in a work folder, training, and the table.

    python RECIPE.py [--work DIR] [--data DIR] [--dry-run] [OPTION=VALUE ...]

A recipe is a subclass of :class:`Recipe` and a YAML file with all its settings. Settings at the top are the
recipe's. Settings in groups are fairseq's, as ``fairseq-hydra-train`` takes them.
"""

import argparse
import fnmatch
import gzip
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence

from .text import (  # noqa: F401  some for the recipes
    BROKEN,
    Line,
    Refused,
    blanks,
    cannot_import,
    check_label,
    digest,
    lines,
    numbered,
    say,
    written,
)

try:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ImportError as error:
    sys.exit(f"{Path(sys.argv[0]).name}: {cannot_import(error)}")

from .settings import (  # noqa: F401  some for the recipes
    Settings,
    expand,
    near,
    options_of,
    own_value,
    read_file,
    read_option,
    require,
    resolve,
)
from .work import PART, Work, difference, log_name, package, program  # noqa: F401

LOCAL = re.compile(r"(path|dir|file|model)$")  # options that name a file
SET_BY_RECIPE = {
    "common.user_dir": "it is this package",
    "task.data": "give --data, the folder with the text",
    "task.num_classes": "the training labels are counted",
    "task.source_lang": "the recipe has its languages",
    "task.target_lang": "the recipe has its languages",
    "checkpoint.save_dir": "give --work and run=NAME",
    "checkpoint.no_save": "the checkpoints are evaluated",
    "checkpoint.no_last_checkpoints": "an interrupted run goes on from the last",
    "checkpoint.checkpoint_suffix": "the checkpoints have fairseq's names",
    "model._name": "give models=NAME",
}


class Run(NamedTuple):
    """A training: its name and its settings for ``fairseq-hydra-train``."""

    name: str
    settings: Dict[str, Dict[str, Any]]

    @property
    def folder(self) -> str:
        return f"runs/{self.name}"


class Recipe:
    """The steps of one recipe. A subclass defines how its data are read and evaluated.

    Attributes:
        script: the recipe's file; its YAML file has the same name
        header: of the table
    """

    script = ""
    header: Sequence[str] = ()

    def __init__(self, words: Sequence[str]) -> None:
        self.name = Path(self.script).stem
        own, self.groups = read_file(Path(self.script).with_suffix(".yaml"))
        self.config = Settings(f"{self.name}.yaml: ", {x: own_value(x, own[x], own[x]) for x in own})
        module = sys.modules[type(self).__module__]
        parser = argparse.ArgumentParser(
            prog=Path(self.script).name,
            usage="%(prog)s [--work DIR] [--data DIR] [--dry-run] [OPTION=VALUE ...]",
            description=(module.__doc__ or "").split("\n")[0],
            epilog=f"OPTION is one of {', '.join(own)}, or GROUP.OPTION of fairseq: see {self.name}.yaml.",
            allow_abbrev=False,
        )
        parser.add_argument("--work", type=expand, help=f"folder to write to (default: {self.work_name()})")
        parser.add_argument("--data", type=expand, help="folder with the data")
        parser.add_argument(
            "--dry-run", action="store_true", help="print the commands, check no data, and change nothing"
        )
        parser.add_argument(
            "options", nargs="*", metavar="OPTION=VALUE", help="setting that replaces the YAML file's"
        )
        args, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            option = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
            raise Refused(
                f"there is no argument {unknown[0]}: there are --work, --data, --dry-run and OPTION=VALUE, "
                f"which has no dashes{self.near(option)}"
            )
        if args.data is not None and not args.data.is_dir():
            raise Refused(f"--data {args.data} is not a folder")
        self.data, self.source, self.options = args.data, args.data, {}
        for option, value in map(read_option, args.options):
            if "." in option:
                if option in SET_BY_RECIPE:
                    raise Refused(f"{option} is set by the recipe: {SET_BY_RECIPE[option]}")
                if isinstance(value, str) and LOCAL.search(option):
                    local = os.path.abspath(expand(value))
                    if os.path.exists(local):
                        value = local
                    elif option.endswith("path"):
                        raise Refused(f"{option} is {value}, which does not exist")
                self.options[option] = value
            elif option in self.config:
                self.config[option] = own_value(option, value, own[option])
            else:
                raise Refused(f"there is no setting {option}{self.near(option)}")
        self.check()
        self.work = Work(args.work or Path(self.work_name()), self.name, args.dry_run)

    def near(self, option: str) -> str:
        """Return a suggestion for the unknown ``option``: settings of the recipe and of fairseq."""
        model = {"_name": self.config["models"][0], **self.groups["model"]}
        return near(option, [*self.config, *options_of({**self.groups, "model": model})])

    def check(self) -> None:
        """Refuse settings that do not fit."""

    def work_name(self) -> str:
        return self.name

    # Data

    def names(self) -> Sequence[str]:
        """Return the names of the files that are read."""
        raise NotImplementedError

    def urls(self) -> Sequence[str]:
        """Return the addresses to fetch without --data: of these files, or of archives with them."""
        return []

    def find(self, name: str) -> Path:
        """Return a file of the data, by its name with or without .gz."""
        for path in (self.source / name, self.source / f"{name}.gz"):
            if path.is_file():
                return path
        raise Refused(f"there is neither {name} nor {name}.gz in {self.source}")

    def files(self) -> Dict[str, Path]:
        """Return the files of --data by name, or none if they are fetched."""
        if self.data is None:
            if not self.urls():
                raise Refused(f"give --data, the folder with {', '.join(self.names())}")
            return {}
        return {name: self.find(name) for name in self.names()}

    def text(self, settings: Dict[str, Any], make: Callable[[Path], None]) -> None:
        """Do the step "text": call ``make``, which reads the data and writes text."""
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
        """Download a file to download/. A compressed file must be whole."""
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
                raise Refused(f"{url} is not a whole archive: {broken}")

        self.work.step(name, {"url": url}, {}, check, [words])

    def unpack(self, part: Path) -> Path:
        """Unpack the files from the fetched archives, and return their folder."""
        folder = part / "unpacked"
        folder.mkdir()

        def take(member: str, opened: Callable[[], Any]) -> None:
            name = member.rsplit("/", 1)[-1]
            if name in self.names():
                with opened() as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)

        for url in self.urls():
            path = self.work.folder / "download" / url.rsplit("/", 1)[1]
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for member in archive.infolist():
                        take(member.filename, lambda m=member, a=archive: a.open(m))
            elif path.suffix == ".tgz":
                with tarfile.open(path) as archive:
                    for member in archive:
                        take(member.name, lambda m=member, a=archive: a.extractfile(m))
            else:
                shutil.copy(path, folder)
        return folder

    def choose(self, name: str, choices: Iterable[str]) -> None:
        if self.config[name] not in choices:
            raise Refused(f"{name} is {self.config[name]}, but must be {' or '.join(choices)}")

    # Runs

    def run(self, model: str) -> Run:
        """Return the run of ``model``, one of the YAML file's architectures, or any if these have "*"."""
        architectures = self.groups["architectures"]
        known = [pattern for pattern in architectures if fnmatch.fnmatchcase(model, pattern)]
        if not known:
            raise Refused(f"models has {model}, but must have only {', '.join(architectures)}")
        values = architectures[model if model in architectures else known[0]] or {}
        tree = OmegaConf.create({k: v for k, v in self.groups.items() if k != "architectures"})
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
        if not re.fullmatch(r"[^./:\s][^/:\n\r]*", name):  # fairseq takes a colon for the end of a path
            raise Refused(
                f"run is {name!r}, but must be the name of a folder that has no colon and begins with no dot "
                "or blank"
            )
        try:
            groups = OmegaConf.to_container(tree, resolve=True)
        except OmegaConfBaseException as error:
            raise Refused(f"the settings of {name} refer to nothing: {error}".split("\n")[0]) from error
        where = self.config.where
        run = Run(name, {group: Settings(f"{where}{group}.", groups[group]) for group in groups})
        if self.evaluated(run) == "best":
            ends = {"validate_after_updates": "max_update", "validate_interval": "max_epoch"}
            for option in ("disable_validation", *ends):
                value, end = groups["dataset"].get(option), groups["optimization"].get(ends.get(option))
                if value is True or (isinstance(value, int) and isinstance(end, int) and 0 < end < value):
                    raise Refused(
                        f"dataset.{option} is {value}, but the best validation's checkpoint is evaluated"
                    )
        return run

    def training(self, run: Run) -> Dict[str, Dict[str, Any]]:
        """Return the settings of fairseq-hydra-train, without those of translating."""
        return {group: options for group, options in run.settings.items() if group != "generation"}

    def train(self, run: Run, inputs: Dict[str, Optional[str]]) -> None:
        """Train in the run's folder, or continue there, but never with other settings than at the start."""
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
            raise Refused(f"{folder} exists, but is not this recipe's: give another run=NAME")
        if begun is not None and run.name in work.runs():
            if (begun["settings"], begun["inputs"]) != (entry["settings"], entry["inputs"]):
                raise Refused(
                    f"{folder} was trained before {difference(begun, entry)}: give another run=NAME or "
                    "--work, or remove it"
                )
            if begun["outputs"]:
                if work.hash(last) != begun["outputs"][last]:
                    raise Refused(
                        f"{folder} was trained, but checkpoint_last.pt was changed since: remove the folder"
                    )
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
            if log.exists() and not (work.folder / last).exists():
                log.unlink()  # of an attempt that left nothing to go on from
            OmegaConf.save(OmegaConf.create(config), str(folder / "train.yaml"))
            say(f"   log: {log}")
        work.run(words, log, run.folder)
        if not work.dry:
            if not (work.folder / last).exists():
                raise Refused(f"training ended without a checkpoint, see {log}")
            entry["outputs"] = {last: work.hash(last)}
            work.save()

    def evaluated(self, run: Run) -> str:
        """Return the name of the checkpoint that is evaluated."""
        return "best"

    def checkpoint(self, run: Run) -> str:
        """Return the path of the checkpoint that is evaluated."""
        return f"{run.folder}/checkpoint_{self.evaluated(run)}.pt"

    def hashes(self, run: Run) -> Dict[str, Optional[str]]:
        """Return the hashes of the checkpoint that is evaluated and of the binary data, by path."""
        path = self.checkpoint(run)
        if not self.work.dry and not (self.work.folder / path).is_file():
            raise Refused(f"{self.work.folder / path} does not exist: remove the run's folder to train again")
        return {path: self.work.hash(path), **self.work.outputs("binarize")}

    def log(self, run: Run, name: str = "train.log") -> str:
        path = self.work.folder / run.folder / name
        return path.read_text(encoding="utf-8", errors="replace")

    def parameters(self, run: Run) -> str:
        """Return the model's number of parameters from the training's log."""
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
        return f"{1 / rate:.3f}" if rate else "-"

    def scores(
        self,
        step: str,
        inputs: Dict[str, Optional[str]],
        commands: Sequence[Sequence[Any]],
        read: Callable[[Path, str], Any],
    ) -> Any:
        """Do a step that evaluates: return the result of ``read``, which gets a folder and the log's text.

        STEP.json keeps it until the commands or their inputs change.
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
        """Evaluate a trained run and return its row of the table, or nothing in a dry run."""
        raise NotImplementedError

    def close(self) -> None:
        """Print the part after the table."""

    def execute(self) -> None:
        """Do all steps that are not done and print the table."""
        runs = [self.run(model) for model in dict.fromkeys(self.config["models"])]
        untrained = [run for run in runs if not self.work.outputs(f"{run.folder}/train")]
        for run in untrained:
            resolve(run.settings)
        self.files()
        if not self.work.dry:
            self.work.open()
        self.prepare()
        rows = []
        for run in runs:
            if run in untrained and not self.work.dry:
                self.examine(run)
            self.train(run, self.work.outputs("binarize"))
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
    """Print which training examples are longer than the model reads. Refuse such examples in other sets.

    Args:
        split: train, valid or test
        path, sizes: a file, and how many tokens each of its lines becomes, ``</s>`` included
        limit, option: the greatest size, and the option that sets it
        spare: fairseq drops longer ones from training
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
    """Run a recipe with the command line's words. End with one sentence if it fails."""
    name = Path(sys.argv[0]).name

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)
    try:
        recipe(sys.argv[1:]).execute()
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on from there")
    except BrokenPipeError:
        sys.exit(1)
    except (Refused, OSError) as error:
        sys.exit(f"{name}: {error}")
