"""WikiText-2, from tokens to perplexity, for each recurrent unit; README.md explains the settings."""

import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe import PART, Line, Recipe, Refused, Run, blanks, lines, main, package, say

SPLITS = ("train", "valid", "test")


class WikiText2(Recipe):
    script = __file__
    header = ("unit", "parameters", "validation perplexity", "test perplexity", "training s/batch")

    def read(self) -> Sequence[str]:
        """Return the splits that are read."""
        return SPLITS[1:] if self.config["small"] else SPLITS

    def names(self) -> List[str]:
        if self.data is not None and (self.data / "wiki.test.tokens").exists():
            return [f"wiki.{split}.tokens" for split in self.read()]
        return [f"{split}.txt" for split in self.read()]

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/{split}.txt" for split in self.read()]

    def split(self) -> Dict[str, Iterator[Line]]:
        """Return each split's lines. wikitext2.yaml describes the small text."""
        found = dict(zip(self.read(), (lines(self.find(name)) for name in self.names())))
        if self.config["small"]:
            both = list(found["test"])
            # from the middle on, the first title of an article, " = Title = ", begins the second half
            title = re.compile(r" *= [^=]* = *")
            begins = [i for i in range(len(both) // 2, len(both)) if title.fullmatch(both[i].text)]
            if not begins:
                raise Refused(f"no article begins in the second half of {self.find(self.names()[-1])}")
            found = {"train": found["valid"], "valid": both[: begins[0]], "test": both[begins[0] :]}
        return found

    def write_text(self, part: Path) -> None:
        (part / "text").mkdir()
        for split, text in self.split().items():
            words = 0
            with open(part / "text" / split, "w", encoding="utf-8", newline="\n") as file:
                for line in text:
                    words += len(line.text.split())
                    file.write(blanks(line.text) + "\n")
            if not words:
                raise Refused(f"there is no text for {split}")
            say(f"   {split}: {words} words")

    def prepare(self) -> None:
        self.text({"small": self.config["small"]}, self.write_text)
        command = ["fairseq-preprocess", "--only-source", "--destdir", f"{PART}/bin"]
        command += [word for split in SPLITS for word in (f"--{split}pref", f"text/{split}")]
        self.work.step("binarize", {}, self.work.outputs("text"), lambda part: None, [command])

    def evaluate(self, run: Run) -> Sequence[Any]:
        command = ["fairseq-eval-lm", "bin", "--user-dir", package(), "--task", "truncated_bptt_lm"]
        command += ["--path", self.checkpoint(run), "--tokens-per-sample", 512, "--num-workers", 0]
        commands = [[*command, "--gen-subset", split] for split in ("valid", "test")]
        step = f"{run.folder}/perplexity"
        read = re.compile(r"Perplexity: (\S+)").findall
        scores = self.scores(step, self.hashes(run), commands, lambda part, log: read(log))
        return scores and [run.name, self.parameters(run), *scores, self.seconds(run)]


if __name__ == "__main__":
    main(WikiText2)
