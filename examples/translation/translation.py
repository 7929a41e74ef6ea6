"""Shared by the translation recipes: sentences in two languages → subwords → binary data → model → BLEU."""

import io
import os
import re
import statistics
import sys
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe import (  # noqa: F401  some for the recipes
    PART,
    Line,
    OmegaConf,
    Recipe,
    Refused,
    Run,
    expand,
    lengths,
    lines,
    log_name,
    main,
    numbered,
    package,
    program,
    require,
    say,
    written,
)

SPLITS = ("train", "valid", "test")
SCORE = re.compile(r"^ *(\S+\|\S+ = ([\d.]+).*)$", re.M)


class Translation(Recipe):
    """A recipe for pairs of sentences.

    Attributes:
        published: others published figures for these data. So they are also scored in the published way, and
            faults of the validation and test sets are printed, not refused.
    """

    published = False

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(words)
        self.header = ["run", "parameters", "BLEU", "chrF", *["BLEU, tokenized, lower case"] * self.published]
        self.signatures: List[str] = []

    def check(self) -> None:
        for name in ("sacrebleu", "sentencepiece", *["sacremoses"] * self.published):
            require(name)
        if self.config["speed_updates"] % 4 or not self.config["speed_updates"] or not self.config["rounds"]:
            raise Refused("speed_updates must be a positive multiple of 4, and rounds positive")

    @property
    def languages(self) -> Tuple[str, str]:
        return self.config["source"], self.config["target"]

    # Text

    def side(self, split: str, language: str) -> Iterator[Line]:
        """Yield the sentences of train, valid or test in one language."""
        raise NotImplementedError

    def pairs(self, split: str) -> Iterator[Tuple[str, str]]:
        """Yield the pairs of a split, whose sides must be equally long. Leave out empty training pairs."""
        total, empty, last = 0, [], None
        for pair in zip_longest(*(self.side(split, language) for language in self.languages)):
            if None in pair:
                line, missing = pair[pair.index(None) - 1], pair.index(None)
                end = (
                    f"{last[missing].path} ends after line {last[missing].number}"
                    if last
                    else "there is none"
                )
                raise line.refuse(f"the other language has no sentence for this one: {end}")
            total, last = total + 1, pair
            without = [line for line in pair if not line.text.strip()]
            if without:
                if split != "train" and not self.published:
                    raise without[0].refuse(f"there is no text, but {split} must have no empty sentences")
                empty.append(without[0])
                if split != "test":
                    continue
            yield pair[0].text, pair[1].text
        if empty:
            done = "kept" if split == "test" else "left out"
            where = f"{empty[0].path}, {numbered([line.number for line in empty])}"
            say(f"   {split}: {len(empty)} of {total} pairs have an empty side and are {done} ({where})")

    def write(self, folder: Path, split: str, pairs: Iterable[Tuple[str, str]]) -> int:
        """Write a file for each language and return the number of pairs."""
        folder.mkdir(exist_ok=True)
        count = 0
        with ExitStack() as stack:
            files = [
                stack.enter_context(open(folder / f"{split}.{language}", "w", encoding="utf-8", newline="\n"))
                for language in self.languages
            ]
            for pair in pairs:
                count += 1
                for text, file in zip(pair, files):
                    file.write(text + "\n")
        if not count:
            raise Refused(f"there is no pair of sentences for {split}")
        say(f"   {split}: {count} pairs")
        return count

    def written(self, kind: str, split: str, language: str) -> Iterator[str]:
        return written(self.work.folder / kind / f"{split}.{language}")

    def learn(self, part: Path) -> None:
        """Learn joint BPE from the training text and split all text into its subwords."""
        import sentencepiece

        model, vocab_size = io.BytesIO(), self.config["vocab_size"]
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(
                    line
                    for language in sorted(self.languages, reverse=True)
                    for line in self.written("text", "train", language)
                ),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                minloglevel=1,
            )
        except RuntimeError as error:
            most = re.search(r"to a value <= (\d+)", str(error))
            least = re.search(r"required_chars. \d+ vs (\d+)", str(error))
            bound = (
                f"at most {most[1]}" if most else f"more than {least[1]}" if least else f"possible: {error}"
            )
            raise Refused(f"vocab_size is {vocab_size}, but must be {bound} for this text") from error
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for split in SPLITS:
            kept = self.write(part / "subwords", split, self.cut(split, processor))
            total = sum(1 for _ in self.written("text", split, self.languages[0]))
            if kept < total:
                say(f"   {split}: {total - kept} of {total} are left out: empty, too long or too uneven")
        (part / "subwords/spm.model").write_bytes(model.getvalue())

    def cut(self, split: str, processor: Any) -> Iterator[Tuple[str, str]]:
        """Yield a split's pairs in subwords; training pairs only within max_length and max_ratio."""
        max_length, max_ratio = self.config["max_length"], self.config["max_ratio"]
        for sides in zip(*(self.written("text", split, language) for language in self.languages)):
            # a piece may be white space, which fairseq passes over
            pair = [" ".join(processor.encode(side, out_type=str)).split() for side in sides]
            shorter, longer = sorted(map(len, pair))
            uneven = max_ratio and longer > max_ratio * shorter
            if split != "train" or not (not shorter or uneven or 0 < max_length < longer):
                yield " ".join(pair[0]), " ".join(pair[1])

    def prepare(self) -> None:
        source, target = self.languages
        words = ["fairseq-preprocess", "-s", source, "-t", target, "--joined-dictionary"]
        words += [word for split in SPLITS for word in (f"--{split}pref", f"subwords/{split}")]
        words += ["--destdir", f"{PART}/bin", "--workers", os.cpu_count() or 1]
        limits = {name: self.config[name] for name in ("vocab_size", "max_length", "max_ratio")}
        self.text(self.text_settings(), self.write_text)
        self.work.step("subwords", limits, self.work.outputs("text"), self.learn)
        self.work.step("binarize", {}, self.work.outputs("subwords"), lambda part: None, [words])

    def text_settings(self) -> Dict[str, Any]:
        return {"source": self.languages[0], "target": self.languages[1]}

    def write_text(self, part: Path) -> None:
        for split in SPLITS:
            self.write(part / "text", split, self.pairs(split))

    # Runs

    def run(self, model: str) -> Run:
        run, average = super().run(model), self.config["average"]
        generation = run.settings["generation"]
        for name in ("beam", "nbest", "temperature", *["max_len_b"] * (not generation.get("max_len_a"))):
            value = generation.get(name)
            if isinstance(value, (int, float)) and value <= 0:
                raise Refused(f"generation.{name} is {value}, but must be positive")
        if average and run.settings["checkpoint"].get("no_epoch_checkpoints"):
            raise Refused(
                f"average is {average}, but checkpoint.no_epoch_checkpoints keeps none: give average=0"
            )
        kept = run.settings["checkpoint"].get("keep_last_epochs", 0)
        if isinstance(kept, int) and 0 < kept < average:
            raise Refused(
                f"average is {average}, but checkpoint.keep_last_epochs is {kept}: give average={kept}"
            )
        return run

    def training(self, run: Run) -> Dict[str, Dict[str, Any]]:
        settings = super().training(run)
        source, target = self.languages
        return {**settings, "task": {**settings["task"], "source_lang": source, "target_lang": target}}

    def examine(self, run: Run) -> None:
        tokens = run.settings["dataset"].get("max_tokens")
        for side, language in zip(("source", "target"), self.languages):
            option = f"max_{side}_positions"
            limits = [(run.settings[group][option], group) for group in ("task", "model")]
            limit, group = min(limits, key=lambda found: found[0])
            for split in SPLITS:
                path = self.work.folder / "subwords" / f"{split}.{language}"
                sizes = (len(line.split()) + 1 for line in written(path))
                lengths(run, split, path, sizes, limit, f"{group}.{option}")
                if tokens is not None and tokens < limit and split != "test":
                    sizes = (
                        size * (size <= limit) for size in (len(line.split()) + 1 for line in written(path))
                    )
                    lengths(run, split, path, sizes, tokens, "dataset.max_tokens", spare=False)

    def search(self, run: Run) -> List[Any]:
        """Return the options of translating, except for the checkpoint and the batches."""
        words: List[Any] = ["--user-dir", package(), "--task", "lrn_translation", "-s", self.languages[0]]
        words += ["-t", self.languages[1]]
        for option, value in run.settings["generation"].items():
            if value is not None and value is not False:
                words += [f"--{option.replace('_', '-')}", *[value] * (value is not True)]
        return words

    def translate(self, run: Run) -> List[Any]:
        """Return the command that translates the test set."""
        words = ["fairseq-generate", "bin", *self.search(run), "--path", self.checkpoint(run)]
        words += ["--remove-bpe", "sentencepiece"]
        return [*words, "--batch-size", 128, "--required-batch-size-multiple", 1]

    def epochs(self, run: Run) -> List[int]:
        """Return the epochs whose checkpoints are averaged: those that a trained run has, and the last."""
        count = self.config["average"]
        if not self.work.outputs(f"{run.folder}/train"):
            return list(range(1, count + 1))
        names = (
            re.fullmatch(r"checkpoint(\d+)\.pt", x.name) for x in (self.work.folder / run.folder).glob("*")
        )
        return sorted(int(name[1]) for name in names if name)[-count:] if count else []

    def evaluated(self, run: Run) -> str:
        count = len(self.epochs(run))
        return f"average{count}" if count else "last" if self.config["average"] else "best"

    def evaluate(self, run: Run) -> List[str]:
        work, name, (_, target) = self.work, self.evaluated(run), self.languages
        epochs, count = self.epochs(run), self.config["average"]
        if len(epochs) < count:
            used = "their mean" if epochs else "the last checkpoint"
            say(f"   average is {count}, but {run.name} has {len(epochs)} whole epochs: {used} translates")
        if epochs:
            self.average(run, epochs)
        translations, reference = f"{run.folder}/{name}.{target}", f"text/test.{target}"

        def collect(part: Path) -> None:
            found = {}
            for line in written(part / log_name(f"{run.folder}/translate.{name}")):
                if line.startswith("D-"):
                    number, _, text = line[2:].split("\t", 2)
                    found.setdefault(int(number), text)  # of several, the best is the first
            sentences = sum(1 for _ in self.written("text", "test", target))
            if sorted(found) != list(range(sentences)):
                raise Refused(f"there are {len(found)} translations of {sentences} sentences")
            (part / translations).write_bytes(
                "".join(found[i] + "\n" for i in range(sentences)).encode("utf-8")
            )

        inputs = {**self.hashes(run), reference: work.hash(reference)}
        settings = {"generation": run.settings["generation"]}
        work.step(f"{run.folder}/translate.{name}", settings, inputs, collect, [self.translate(run)])

        commands = [["sacrebleu", reference, "-i", translations, "-m", "bleu", "chrf", "-f", "text", "-w", 1]]
        commands[0] += self.tokenizer()
        files = [reference, translations]
        if self.published:
            files += self.tokenize(run, name, files)
            words = "-m bleu -lc --tokenize none --force -f text -w 1".split()
            commands.append(["sacrebleu", files[2], "-i", files[3], *words])
        inputs, step = {file: work.hash(file) for file in files}, f"{run.folder}/score.{name}"
        scores = self.scores(step, inputs, commands, lambda part, log: SCORE.findall(log))
        if scores is None:
            return []
        if len(scores) != len(self.header) - 2:
            raise Refused(f"sacrebleu gave {len(scores)} scores, see {work.folder / log_name(step)}")
        self.signatures += [f"{run.name}: {score}" for score, _ in scores]
        return [run.name, self.parameters(run), *(number for _, number in scores)]

    def tokenizer(self) -> List[str]:
        """Return sacreBLEU's options for the target language."""
        return []

    def average(self, run: Run, epochs: Sequence[int]) -> None:
        """Average the parameters of the checkpoints of the ``epochs``, which are the last."""
        files = [f"{run.folder}/checkpoint{epoch}.pt" for epoch in epochs]
        command = [sys.executable, Path(__file__).with_name("average.py"), run.folder, len(epochs)]
        command += [f"{PART}/{self.checkpoint(run)}"]
        inputs = {file: self.work.hash(file) for file in files}
        self.work.step(f"{run.folder}/{self.evaluated(run)}", {}, inputs, lambda part: None, [command])

    def tokenize(self, run: Run, name: str, files: Sequence[str]) -> List[str]:
        """Tokenize reference and translations as Moses does, for the kind of score in papers."""
        outputs = [
            f"{run.folder}/{name}.{kind}.tok.{self.languages[1]}" for kind in ("reference", "translation")
        ]

        def make(part: Path) -> None:
            from sacremoses import MosesTokenizer

            tokenizer = MosesTokenizer(self.languages[1])
            for source, output in zip(files, outputs):
                text = (
                    tokenizer.tokenize(line, return_str=True) for line in written(self.work.folder / source)
                )
                (part / output).write_bytes("".join(line + "\n" for line in text).encode("utf-8"))

        inputs = {file: self.work.hash(file) for file in files}
        self.work.step(f"{run.folder}/tokenize.{name}", {}, inputs, make)
        return outputs

    def close(self) -> None:
        print("\n" + "\n".join(self.signatures))

    # Side by side

    def execute(self) -> None:
        if self.config["compare"]:
            self.compare(self.config["compare"])
        else:
            super().execute()

    def compare(self, names: Sequence[str]) -> None:
        """Train and translate with runs in turn, on the CPU, and print their scores and speeds."""
        work, runs = self.work, []
        if not work.dry:
            work.open()
        for run in dict.fromkeys(names):
            name = self.evaluated(Run(run, {}))
            train, translate = (f"runs/{run}/{x}" for x in ("train", f"translate.{name}"))
            if not (work.outputs(train) and work.outputs(translate) and work.intact(train)):
                raise Refused(f"{work.folder} has no scores of {run}, {name}: train it first")
            runs.append(Run(run, {**work.steps[train]["settings"], **work.steps[translate]["settings"]}))
        work.finished = True
        scores = [self.evaluate(run)[:4] for run in runs]
        work.finished = False
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        speeds: List[List[str]] = []
        work.step("compare", {}, {}, lambda part: speeds.extend(self.speeds(runs)), again=True)
        if work.dry:
            self.speeds(runs)
        else:
            self.header = ["run", "parameters", "BLEU", "chrF", "training words/s", "sentences/s"]
            self.table([[*row, *speed] for row, speed in zip(scores, speeds)])

    def speeds(self, runs: Sequence[Run]) -> List[List[str]]:
        """Return each run's medians. The first quarter of the updates is warm-up and does not count."""
        work, updates, rows = self.work, self.config["speed_updates"], []
        for turn in range(self.config["rounds"]):
            for run in runs:
                folder = f"{PART}/compare/{run.name}"
                if not work.dry:
                    config = OmegaConf.load(work.folder / run.folder / "train.yaml")
                    changed = {
                        "common": {"log_interval": updates // 4, "log_format": "simple"},
                        "task": {"data": "../../../bin"},
                        "optimization": {"max_update": updates, "max_epoch": 0},
                        "checkpoint": {"no_save": True},
                        "dataset": {"disable_validation": True},
                    }
                    (work.folder / folder).mkdir(parents=True, exist_ok=True)
                    OmegaConf.save(OmegaConf.merge(config, changed), str(work.folder / folder / "train.yaml"))
                log = work.folder / folder / f"{turn + 1}.log"
                work.run(["fairseq-hydra-train", "--config-dir", ".", "--config-name", "train"], log, folder)
                work.run(self.translate(run), log)
        for run in [] if work.dry else runs:
            folder = work.folder / PART / "compare" / run.name
            text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("[0-9]*.log")))
            words = [
                float(re.search(r"wps=([\d.]+)", line)[1])
                for line in text.split("\n")
                if "train_inner" in line and f"num_updates={updates // 4}," not in line
            ]
            sentences = [float(speed) for speed in re.findall(r"([\d.]+) sentences/s", text)]
            if not (words and sentences):
                raise Refused(f"{run.name} ended before it printed its speed: see the logs in {folder}")
            rows.append([f"{statistics.median(words):.1f}", f"{statistics.median(sentences):.2f}"])
        return rows
