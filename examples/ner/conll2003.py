"""CoNLL-2003 named entities with each recurrent unit, from four columns to F1; see README.md."""

import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe import PART, Line, Recipe, Refused, Run, check_label, lines, main, package, require, say, written

FILES = {"train": "eng.train", "valid": "eng.testa", "test": "eng.testb"}
# prefixes of what begins and continues an entity, and, where told apart, ends it or is one of one word
SCHEMES = ("BI", "BIES", "BILU")

Word = Tuple[Line, str, str]  # where it is, word, tag


def sentences(text: Iterable[Line], columns: Set[int]) -> Iterator[List[Word]]:
    """Yield each sentence's words and tags, the first and the last column. -DOCSTART- is not a sentence.

    Blanks and tabs separate columns. Other white space in a word becomes "_", since it would end the word.
    ``columns`` gets the number of columns, which must be the same in all lines, and at least two.
    """
    sentence: List[Word] = []
    for line in text:
        row = re.findall(r"[^ \t]+", line.text)
        if row and row[0] != "-DOCSTART-":
            columns.add(len(row))
            if len(columns) > 1 or len(row) < 2:
                others = max(2, *(columns - {len(row)} or {0}))
                raise line.refuse(f"there are {len(row)} columns, but must be {others}")
            check_label(line, "tag", row[-1])
            sentence.append((line, re.sub(r"\s", "_", row[0]), row[-1]))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def scheme(words: Iterable[Word]) -> str:
    """Return the prefixes of the scheme: BI of IOB1 and IOB2, BIES of BIOES and IOBES, BILU of BILOU."""
    found: Set[str] = set()
    for line, _, tag in words:
        prefix, dash, kind = tag.partition("-")
        if tag != "O":
            found.add(prefix)
            if not (len(prefix) == 1 and dash and kind):
                raise line.refuse(f"the tag {tag} is not O or a prefix, a hyphen and a type")
            if not any(found <= set(prefixes) for prefixes in SCHEMES):
                raise line.refuse(
                    f"the tag {tag} makes the prefixes {', '.join(sorted(found))}, which are not those of "
                    "IOB1, IOB2, BIOES, IOBES or BILOU"
                )
    return next(prefixes for prefixes in SCHEMES if found <= set(prefixes))


def to_iobes(words: Sequence[Word], prefixes: str) -> List[str]:
    """Turn a sentence's tags into IOBES: B, I and E begin, continue and end an entity; S is an entity of one
    word.

    In IOB1 an entity begins with I, but with B if it follows another one of the same type. In BIOES and
    BILOU an entity must end before another tag.
    """
    tags, result = [tag for _, _, tag in words], []
    for (line, _, _), before, tag, after in zip(words, ["O", *tags], tags, [*tags[1:], "O"]):
        kind = tag[2:]
        if prefixes == "BI":
            begins = tag[0] == "B" or before[2:] != kind
            prefix = "IEBS"[2 * begins + (after != f"I-{kind}")]
        else:
            goes_on, is_open = ("I", prefixes[2]), before[0] in "BI"
            if is_open != (tag[0] in goes_on) or (is_open and before[2:] != kind):
                raise line.refuse(
                    f"the tag {tag} cannot follow {before} with the prefixes {', '.join(prefixes)}"
                )
            if tag[0] in "BI" and after[0] not in goes_on:
                raise line.refuse(
                    f"the tag {tag} cannot be an entity's last with the prefixes {', '.join(prefixes)}"
                )
            prefix = "BIESO"[f"{prefixes}O".index(tag[0])]
        result.append(f"{prefix}-{kind}" if kind else tag)
    return result


def entities_report(references: Sequence[Sequence[str]], found: Dict[int, List[str]]) -> Tuple[str, str]:
    """Return seqeval's report of generated tags and its F1 in percent."""
    from seqeval.metrics import classification_report, f1_score

    tags = [found.get(i, []) for i in range(len(references))]
    for number, (right, there) in enumerate(zip(references, tags), 1):
        if len(right) != len(there):
            raise Refused(
                f"there are {len(there)} tags for sentence {number} of the test, which has {len(right)}"
            )
    report = classification_report(list(references), tags, digits=4)
    return report, f"{100 * f1_score(list(references), tags):.2f}"


class CoNLL2003(Recipe):
    script = __file__
    header = ("unit", "parameters", "dev F1", "test F1", "training s a batch")

    def check(self) -> None:
        require("pytorch-crf", "torchcrf")
        require("seqeval")

    def names(self) -> Sequence[str]:
        return list(FILES.values())

    def write_text(self, part: Path) -> None:
        (part / "text").mkdir()
        columns: Set[int] = set()
        text = {split: list(sentences(lines(self.find(name)), columns)) for split, name in FILES.items()}
        prefixes = scheme(word for split in text.values() for sentence in split for word in sentence)
        known: Set[str] = set()
        for split, found in text.items():
            if not found:
                raise Refused(f"{self.find(FILES[split])} has no sentences")
            rows: List[Tuple[List[str], List[str]]] = []
            for sentence in found:
                tags = to_iobes(sentence, prefixes)
                if split == "train":
                    known.update(tags)
                for (line, _, _), tag in zip(sentence, tags):
                    if tag not in known:
                        raise line.refuse(f"the tag {tag} (in IOBES) is not in the training set")
                rows.append(([word for _, word, _ in sentence], tags))
            for i, name in enumerate(("words", "tags")):
                lines_of = "".join(" ".join(row[i]) + "\n" for row in rows)
                (part / f"text/{split}.{name}").write_bytes(lines_of.encode("utf-8"))
            say(f"   {split}: {len(rows)} sentences")

    def prepare(self) -> None:
        self.text({}, self.write_text)
        command = ["fairseq-preprocess", "-s", "words", "-t", "tags", "--dataset-impl", "raw"]
        command += ["--thresholdsrc", self.config["min_count"], "--padding-factor", 1]
        command += ["--destdir", f"{PART}/bin"]
        command += [word for split in FILES for word in (f"--{split}pref", f"text/{split}")]
        settings = {"min_count": self.config["min_count"]}
        self.work.step("binarize", settings, self.work.outputs("text"), lambda part: None, [command])

    def evaluate(self, run: Run) -> Sequence[Any]:
        common = ["bin", "--user-dir", package(), "--task", "tagging", "--required-batch-size-multiple", 1]
        common += ["--num-workers", 0, "--path", self.checkpoint(run), "--batch-size", 128]
        if "max_word_length" in run.settings["task"]:
            common += ["--max-word-length", run.settings["task"]["max_word_length"]]
        commands = [
            ["fairseq-validate", *common, "--valid-subset", "valid,test"],
            ["fairseq-generate", *common],
        ]

        def read(part: Path, log: str) -> List[str]:
            dev, test = (f"{float(f1):.2f}" for f1 in re.findall(r" f1 ([\d.]+)", log)[:2])
            tags = {int(i): line.split() for i, line in re.findall(r"^D-(\d+)\t\S+\t(.*)$", log, re.M)}
            references = [line.split() for line in written(self.work.folder / "text/test.tags")]
            report, f1 = entities_report(references, tags)
            if f1 != test:
                raise Refused(f"fairseq-validate counts F1 {test}, seqeval of the generated tags {f1}")
            (part / f"{run.folder}/test.score").write_text(report)
            return [dev, test]

        scores = self.scores(f"{run.folder}/f1", self.hashes(run), commands, read)
        return scores and [run.name, self.parameters(run), *scores, self.seconds(run)]


if __name__ == "__main__":
    main(CoNLL2003)
