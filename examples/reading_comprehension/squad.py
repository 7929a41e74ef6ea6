"""Reading comprehension with each recurrent unit, from SQuAD's JSON to exact match and F1; see README.md."""

import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe import Recipe, Refused, Run, main, package, say

TOKEN = re.compile(r"\w+|[^\w\s]")
DATASETS = {"xquad": ("xquad.en.json",), "squad": ("train-v1.1.json", "dev-v1.1.json")}


def tokenize(text: str) -> List[Tuple[int, int]]:
    """Return where each word and each punctuation mark of ``text`` begins and ends."""
    return [match.span() for match in TOKEN.finditer(text)]


def load(path: Path) -> List[Dict[str, Any]]:
    """Return a file's articles.

    Raises :class:`Refused` if the file is not JSON in SQuAD's form, an id occurs twice, a question has no
    words or no answer, or an answer is not at its place.
    """
    try:
        articles = json.loads(path.read_bytes().decode("utf-8-sig"))["data"]
        questions = [
            (paragraph["context"], question["id"], question["question"], question["answers"])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        answers = [(x["text"], x["answer_start"]) for *_, found in questions for x in found]
        if any(type(x) is not str for row in questions for x in row[:3]):
            raise TypeError("a context, an id or a question is not text")
        if any((type(text), type(start)) != (str, int) for text, start in answers):
            raise TypeError("an answer is not text, or its start is not a whole number")
        json.dumps(articles, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written
    except UnicodeError as error:
        raise Refused(f"{path} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise Refused(f"{path}, line {error.lineno}: this is not JSON: {error.msg}") from error
    except (KeyError, TypeError) as error:
        raise Refused(f"{path} is not in the form of SQuAD 1.1: {type(error).__name__} {error}") from error
    ids = set()
    for text, name, asked, found in questions:
        where = f"{path}, question {name}"
        if name in ids:
            raise Refused(f"{where}: another question has the same id")
        ids.add(name)
        if not TOKEN.search(asked) or not found:
            raise Refused(f"{where}: the question must have words and at least one answer")
        for answer in found:
            begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            if begin < 0 or text[begin:end] != answer["text"] or not TOKEN.search(answer["text"]):
                raise Refused(
                    f"{where}: the passage does not have the answer {answer['text']!r} at character {begin}"
                )
    return articles


def read(articles: Sequence[Dict[str, Any]]) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]], int]:
    """Return the passages, the questions, and how many answers were widened to whole tokens."""
    passages: List[Dict[str, Any]] = []
    questions: List[Dict[str, Any]] = []
    widened = 0
    for article in articles:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            tokens = tokenize(text)
            for question in paragraph["qas"]:
                spans = []
                for answer in question["answers"]:
                    begin = answer["answer_start"]
                    end = begin + len(answer["text"])
                    inside = [i for i, (left, right) in enumerate(tokens) if left < end and right > begin]
                    spans.append((inside[0], inside[-1]))
                    widened += tokens[inside[0]][0] < begin or tokens[inside[-1]][1] > end
                questions.append(
                    {
                        "id": question["id"],
                        "tokens": TOKEN.findall(question["question"]),
                        "passage": len(passages),
                        "span": spans[0],
                        "answers": [answer["text"] for answer in question["answers"]],
                    }
                )
            passages.append({"text": text, "tokens": tokens})
    return passages, questions, widened


class SQuAD(Recipe):
    script = __file__

    def check(self) -> None:
        self.choose("corpus", DATASETS)
        self.splits = ("train", "valid", "test") if self.config["corpus"] == "xquad" else ("train", "valid")
        scores = [cell for split in self.splits for cell in (f"{split} EM", f"{split} F1")]
        self.header = ["unit", "parameters", *scores, "s/batch"]

    def work_name(self) -> str:
        return self.config["corpus"]

    def names(self) -> Sequence[str]:
        return DATASETS[self.config["corpus"]]

    def urls(self) -> List[str]:
        return [f"{self.config['url_' + self.config['corpus']]}/{name}" for name in self.names()]

    def write_text(self, part: Path) -> None:
        """Write a file for each split. Of every ten articles of XQuAD one is for valid and one for test."""
        (part / "text").mkdir()
        paths = [self.find(name) for name in self.names()]
        found = [load(path) for path in paths]
        if len(found) == 1:
            (articles,) = found
            if len(articles) < 10:
                raise Refused(f"{paths[0]} has {len(articles)} articles, but must have at least 10")
            found = [
                [article for i, article in enumerate(articles) if i % 10 in digits]
                for digits in (range(8), [8], [9])
            ]
        for split, articles in zip(self.splits, found):
            count = sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])
            if not count:
                raise Refused(f"there is no question for {split}")
            text = json.dumps({"version": "1.1", "data": articles})
            (part / f"text/{split}.json").write_text(text, encoding="utf-8")
            say(f"   {split}: {count} questions")

    def write_bin(self, part: Path) -> None:
        """Write each split's passages and questions, an object a line, and the training's words."""
        from fairseq.data import Dictionary

        (part / "bin").mkdir()
        for split in self.splits:
            passages, questions, widened = read(load(self.work.folder / f"text/{split}.json"))
            say(f"   {split}: {widened} answers widened to whole tokens")
            for kind, rows in (("passages", passages), ("questions", questions)):
                (part / f"bin/{split}.{kind}").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if split == "train":
                dictionary = Dictionary()
                texts = [[row["text"][begin:end] for begin, end in row["tokens"]] for row in passages]
                for words in texts + [row["tokens"] for row in questions]:
                    for word in words:
                        dictionary.add_symbol(word)
                dictionary.finalize(threshold=2, padding_factor=1)
                dictionary.save(str(part / "bin/dict.txt"))

    def prepare(self) -> None:
        self.text({"corpus": self.config["corpus"]}, self.write_text)
        self.work.step("binarize", {}, self.work.outputs("text"), self.write_bin)

    def evaluated(self, run: Run) -> str:
        return "last"

    def evaluate(self, run: Run) -> Sequence[Any]:
        last, splits = self.checkpoint(run), self.splits
        validate = ["fairseq-validate", "bin", "--user-dir", package(), "--task", "reading_comprehension"]
        validate += ["--path", last, "--valid-subset", ",".join(splits), "--batch-size", 32]
        validate += ["--num-workers", 0, "--required-batch-size-multiple", 1, "--log-format", "simple"]
        script = Path(__file__).with_name("predict.py")
        predict = [sys.executable, script, last, "bin", splits[-1], f"{run.folder}/answers.json"]
        predict[-1] = f".part/{predict[-1]}"

        def found(part: Path, log: str) -> List[str]:
            rows = [re.search(rf"valid on '{split}' subset \|(.*)", log)[1] for split in splits]
            return [re.search(rf" {metric} ([\d.]+)", row)[1] for row in rows for metric in ("em", "f1")]

        scores = self.scores(f"{run.folder}/exact_match", self.hashes(run), [validate, predict], found)
        return scores and [run.name, self.parameters(run), *scores, self.seconds(run)]


if __name__ == "__main__":
    main(SQuAD)
