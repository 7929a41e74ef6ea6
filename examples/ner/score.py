"""Entities of generated tags against the right ones: seqeval's report, then F1 in percent on its own line.

python score.py test.tags GENERATED    GENERATED is fairseq-generate's output
"""

import re
import sys
from pathlib import Path

from seqeval.metrics import classification_report, f1_score


def main(references: str, generated: str) -> None:
    right = [line.split() for line in Path(references).read_text("utf-8").splitlines()]
    found = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", Path(generated).read_text("utf-8"), re.M))
    tags = [found.get(str(i), "").split() for i in range(len(right))]
    for number, (a, b) in enumerate(zip(right, tags), 1):
        if len(a) != len(b):
            sys.exit(f"{generated} has {len(b)} tags for line {number} of {references}, which has {len(a)}")
    print(classification_report(right, tags, digits=4))
    print(f"{100 * f1_score(right, tags):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
