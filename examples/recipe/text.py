"""Reads text line by line, and reports a fault in one sentence."""

import gzip
import hashlib
import re
import sys
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a part of a compressed file raises


class Refused(Exception):
    """A fault, in one sentence for the user."""


def cannot_import(error: ImportError) -> Refused:
    """Return what to say if fairseq, or what comes with it, is missing."""
    return Refused(
        f"{error} in {sys.executable}: use the Python that has fairseq and this package, as .venv/bin/python "
        "after the quickstart"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Line(NamedTuple):
    """A line of a file, without its end, and its place."""

    path: Path
    number: int
    text: str

    def refuse(self, reason: str) -> Refused:
        return Refused(f"{self.path}, line {self.number}: {reason}")


def lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a UTF-8 file, compressed by gzip or not. They end with ``\n`` or ``\r\n``.

    A byte order mark is left out. So is an empty last line without an end.
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
    """Replace all white space, as Python counts it, by blanks: also U+00A0, U+2028 and control characters."""
    return re.sub(r"\s", " ", text)


def check_label(line: Line, kind: str, value: str) -> None:
    """Refuse a label that fairseq would not read as one word of its dictionary."""
    if re.search(r"\s", value):
        raise line.refuse(f"the {kind} {value!r} has a blank in it")
    if value in ("<s>", "<pad>", "</s>", "<unk>"):
        raise line.refuse(f"the {kind} {value} is one of fairseq's symbols")


def numbered(numbers: Sequence[int]) -> str:
    """Return the first line numbers, and how many there are in all."""
    some = ", ".join(str(number) for number in numbers[:3])
    return f"line {some}" if len(numbers) == 1 else f"lines {some}{', …' if len(numbers) > 3 else ''}"


def digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def written(path: Path) -> Iterator[str]:
    r"""Yield the lines of a file that a recipe wrote; each ends with ``\n``."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")
