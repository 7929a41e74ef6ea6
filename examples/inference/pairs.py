"""Shared by SICK and SNLI: pairs of sentences in a table with tabs."""

import sys
from pathlib import Path
from typing import Iterator, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "classification"))

from sentences import Row, Sentences, filled, lines, main, words  # noqa: F401


class Pairs(Sentences):
    """A recipe of pairs of sentences.

    Attributes:
        columns: names of the columns of label, first and second sentence
        files_of: the names of the files of train, valid and test
        optional: the first of the last columns that a row may omit
    """

    inputs = ("input0", "input1")
    columns: Sequence[str] = ()
    files_of: Sequence[str] = ()
    optional = ""

    def names(self) -> Sequence[str]:
        return self.files_of

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows below a line of names, except pairs without an agreed label."""
        header: Sequence[str] = ()
        for line in filled(lines(self.find(self.files_of[("train", "valid", "test").index(split)]))):
            row = line.text.split("\t")
            if not header:
                header = row
                if not set(self.columns) <= set(header):
                    raise line.refuse(f"the columns must have the names {', '.join(self.columns)}")
                continue
            fewer = header.index(self.optional) if self.optional in header else len(header)
            if len(row) not in (len(header), fewer):
                raise line.refuse(f"there are {len(row)} columns, but must be {len(header)}")
            label, *texts = (row[header.index(name)] for name in self.columns)
            if label != "-":
                yield Row(line, label, [words(text) for text in texts])
