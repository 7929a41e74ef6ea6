"""From a table of labelled text to words, as fairseq's task sentence_prediction reads them.

    python words.py documents|sick|snli PREFIX < TABLE

writes PREFIX.label, PREFIX.input0 and, of pairs, PREFIX.input1, a line for each row of the table. Words are
in lower case; every sign that is no letter, digit or apostrophe within a word is a word of its own.
"""

import contextlib
import csv
import re
import sys
from typing import Iterable, Iterator, List, Tuple

# the columns of label, first and second sentence
PAIRS = {
    "sick": ("entailment_judgment", "sentence_A", "sentence_B"),
    "snli": ("gold_label", "sentence1", "sentence2"),
}


def read(table: str, lines: Iterable[str]) -> Iterator[Tuple[str, List[str]]]:
    """Yield label and texts of each row, but for SNLI's "-", pairs on whose label there was no agreement.

    ``table`` is "sick" or "snli", tab-separated under a line of names, or "documents", comma-separated label,
    title and text (Zhang et al., NeurIPS 2015).
    """
    if table == "documents":
        for label, *fields in csv.reader(lines):
            yield label, [" ".join(fields).replace("\\n", " ")]
    else:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            label, *texts = (row[name] for name in PAIRS[table])
            if label != "-":
                yield label, texts


def words(text: str) -> List[str]:
    """Split a text to its words."""
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower())


def main(table: str, prefix: str) -> None:
    """Write the words of the table on the standard input."""
    sys.stdin.reconfigure(encoding="utf-8", newline="")
    names = ["label", "input0"] + ["input1"] * (table in PAIRS)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(f"{prefix}.{name}", "w", encoding="utf-8")) for name in names]
        for label, texts in read(table, sys.stdin):
            for file, line in zip(files, [label] + [" ".join(words(text)) for text in texts]):
                file.write(line + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
