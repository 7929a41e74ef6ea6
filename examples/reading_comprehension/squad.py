"""SQuAD 1.1's JSON as the task reading_comprehension reads it: python squad.py JSON BIN

Each SPLIT.json in the folder JSON becomes SPLIT.passages and SPLIT.questions in BIN, one JSON object a line.
BIN/dict.txt has the words that train.json has at least twice; the others share <unk>, and their characters
tell them apart.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from fairseq.data import Dictionary

TOKEN = re.compile(r"\w+|[^\w\s]")


def tokenize(text: str) -> List[Tuple[int, int]]:
    """Return where each word and each punctuation mark of ``text`` begins and ends."""
    return [match.span() for match in TOKEN.finditer(text)]


def read(path: Path) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]], int]:
    """Return a file's passages, its questions, and how many answers were widened to whole tokens.

    Raises ``ValueError`` where an id occurs twice, a text has no words, or an answer is missing or not there.
    """
    passages: List[Dict[str, Any]] = []
    questions: List[Dict[str, Any]] = []
    ids, widened = set(), 0
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            tokens = tokenize(text)
            for question in paragraph["qas"]:
                where, words = f"{path}, question {question['id']}", TOKEN.findall(question["question"])
                if question["id"] in ids:
                    raise ValueError(f"{where}: another question has the same id")
                ids.add(question["id"])
                if not words or not question["answers"]:
                    raise ValueError(f"{where}: the question must have words and at least one answer")
                spans = []
                for answer in question["answers"]:
                    begin = answer["answer_start"]
                    end = begin + len(answer["text"])
                    inside = [i for i, (left, right) in enumerate(tokens) if left < end and right > begin]
                    if text[begin:end] != answer["text"] or not inside:
                        raise ValueError(
                            f"{where}: the passage does not have the answer {answer['text']!r} at character "
                            f"{begin}"
                        )
                    spans.append((inside[0], inside[-1]))
                    widened += tokens[inside[0]][0] < begin or tokens[inside[-1]][1] > end
                questions.append(
                    {
                        "id": question["id"],
                        "tokens": words,
                        "passage": len(passages),
                        "span": spans[0],
                        "answers": [answer["text"] for answer in question["answers"]],
                    }
                )
            passages.append({"text": text, "tokens": tokens})
    return passages, questions, widened


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        passages, questions, widened = read(path)
        print(f"{path}: {len(questions)} questions, {widened} answers widened to whole tokens")
        for kind, rows in (("passages", passages), ("questions", questions)):
            (target / f"{path.stem}.{kind}").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if path.stem == "train":
            dictionary = Dictionary()
            texts = [[row["text"][begin:end] for begin, end in row["tokens"]] for row in passages]
            for words in texts + [row["tokens"] for row in questions]:
                for word in words:
                    dictionary.add_symbol(word)
            dictionary.finalize(threshold=2, padding_factor=1)
            dictionary.save(str(target / "dict.txt"))
