"""CoNLL-2003's four columns as lines of words and lines of tags, IOB1 turned into IOBES.

python conll.py eng.testa OUTPUT    writes OUTPUT.words and OUTPUT.tags, a sentence a line
"""

import sys
from pathlib import Path
from typing import Iterable, Iterator, List, Tuple


def read(lines: Iterable[str]) -> Iterator[Tuple[List[str], List[str]]]:
    """Yield each sentence's words and tags, the first and the last column; -DOCSTART- is no sentence."""
    words, tags = [], []
    for line in [*lines, ""]:
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield words, tags
            words, tags = [], []


def to_iobes(tags: List[str]) -> List[str]:
    """Turn IOB1 (or IOB2) into IOBES: B, I and E begin, continue and end an entity, S is one of one word.

    In IOB1 an entity begins with I, but with B where it follows another one of the same type.
    """
    result = []
    for before, tag, after in zip(["O", *tags], tags, [*tags[1:], "O"]):
        prefix, _, kind = tag.partition("-")
        if kind:
            begins = prefix == "B" or before[2:] != kind
            ends = after != f"I-{kind}"
            tag = f"{'IEBS'[2 * begins + ends]}-{kind}"
        result.append(tag)
    return result


def main(source: str, output: str) -> None:
    with open(source, encoding="utf-8") as file:
        sentences = list(read(file))
    if not sentences:
        sys.exit(f"{source} has no sentences")
    for name, lines in (
        ("words", [words for words, _ in sentences]),
        ("tags", [to_iobes(tags) for _, tags in sentences]),
    ):
        Path(f"{output}.{name}").write_text("".join(" ".join(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
