"""Shared by the recipes of labelled sentences: words → binary data → a model of each unit → accuracy."""

import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe import (  # noqa: F401  some for the recipes
    PART,
    Line,
    Recipe,
    Refused,
    Run,
    blanks,
    check_label,
    lengths,
    lines,
    main,
    numbered,
    package,
    require,
    say,
    written,
)

SPLITS = ("train", "valid", "test")


class Row(NamedTuple):
    """A labelled text, or pair of texts, and where it is."""

    line: Line
    label: str
    texts: Sequence[str]


def words(text: str) -> str:
    """Split a text, in lower case, into words; a sign other than letters, digits and inner apostrophes is
    one."""
    return " ".join(re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower()))


def filled(found: Iterator[Line]) -> Iterator[Line]:
    """Yield the lines that are not empty, and print which are."""
    empty = []
    for line in found:
        if line.text.strip():
            yield line
        else:
            empty.append(line)
    if empty:
        say(f"   {empty[0].path}: {numbered([line.number for line in empty])} empty, left out")


class Sentences(Recipe):
    """A recipe of texts, or pairs of texts, and their labels.

    Attributes:
        inputs: input0, and input1 of pairs
    """

    header = (
        "unit",
        "parameters",
        "validation accuracy",
        "test accuracy",
        "test error %",
        "training s a batch",
    )
    inputs: Sequence[str] = ("input0",)

    def check(self) -> None:
        require("scikit-learn", "sklearn")  # of fairseq's criterion

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of train, valid or test, each text as words with blanks between."""
        raise NotImplementedError

    def write_text(self, part: Path) -> None:
        (part / "text").mkdir()
        known = set()
        for split in SPLITS:
            columns: List[List[str]] = [[] for _ in ("label", *self.inputs)]
            for line, label, texts in self.rows(split):
                if not label:
                    raise line.refuse("there is no label")
                check_label(line, "label", label)
                if not all(text.strip() for text in texts):
                    raise line.refuse(f"the label {label} has no text")
                if split == "train":
                    known.add(label)
                elif label not in known:
                    raise line.refuse(
                        f"the label {label} is not in the training set, which has {', '.join(sorted(known))}"
                    )
                for column, value in zip(columns, (label, *texts)):
                    column.append(value)
            if not columns[0]:
                raise Refused(f"there is no text for {split}")
            for name, column in zip(("label", *self.inputs), columns):
                text = "".join(value + "\n" for value in column)
                (part / f"text/{split}.{name}").write_bytes(text.encode("utf-8"))
            if split == "train" and len(self.inputs) > 1:  # both sentences of a pair have one dictionary
                text = "".join(value + "\n" for column in columns[1:] for value in column)
                (part / "text/train.inputs").write_bytes(text.encode("utf-8"))
            say(f"   {split}: {len(columns[0])} with labels")

    def prepare(self) -> None:
        self.text(self.text_settings(), self.write_text)
        text = "text/train.input0" if len(self.inputs) == 1 else "text/train.inputs"
        preprocess = ["fairseq-preprocess", "--only-source"]
        commands = [[*preprocess, "--dict-only", "--trainpref", text, "--destdir", f"{PART}/bin"]]
        commands[0] += ["--thresholdsrc", self.config["min_count"]]
        for name in (*self.inputs, "label"):
            command = [*preprocess, "--destdir", f"{PART}/bin/{name}"]
            command += [word for split in SPLITS for word in (f"--{split}pref", f"text/{split}.{name}")]
            commands.append(command + ["--srcdict", f"{PART}/bin/dict.txt"] * (name != "label"))
        settings = {"min_count": self.config["min_count"]}
        self.work.step("binarize", settings, self.work.outputs("text"), lambda part: None, commands)

    def text_settings(self) -> Dict[str, Any]:
        return {}

    def training(self, run: Run) -> Dict[str, Dict[str, Any]]:
        settings = super().training(run)
        labels = self.work.folder / "text/train.label"
        classes = len(set(written(labels))) if labels.exists() else 1
        return {**settings, "task": {**settings["task"], "num_classes": classes}}

    def examine(self, run: Run) -> None:
        task = run.settings["task"]
        if task.get("shorten_method", "none") != "none":
            return
        for split in SPLITS:
            paths = [self.work.folder / "text" / f"{split}.{name}" for name in self.inputs]
            sizes = (sum(len(text.split()) + 1 for text in texts) for texts in zip(*map(written, paths)))
            lengths(run, split, paths[0], sizes, task["max_positions"], "task.max_positions")

    def evaluate(self, run: Run) -> Sequence[Any]:
        command = ["fairseq-validate", "bin", "--user-dir", package(), "--task", "sentence_prediction"]
        command += ["--criterion", "sentence_prediction", "--path", self.checkpoint(run)]
        command += ["--valid-subset", "valid,test"]
        command += ["--batch-size", 64, "--required-batch-size-multiple", 1, "--num-workers", 0]

        def read(part: Path, log: str) -> List[float]:
            found = [
                re.search(rf"valid on '{split}' subset \|.* accuracy ([\d.]+)", log) for split in SPLITS[1:]
            ]
            return [float(accuracy[1]) for accuracy in found]

        command += ["--log-format", "simple"]
        scores = self.scores(f"{run.folder}/accuracy", self.hashes(run), [command], read)
        if scores is None:
            return []
        valid, test = scores
        return [run.name, self.parameters(run), valid, test, f"{100 - test:.1f}", self.seconds(run)]
