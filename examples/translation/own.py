"""A translator from your own text, two files of any two languages, from raw text to BLEU; see README.md."""

import hashlib
import importlib.util
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from translation import SPLITS, Line, Refused, Translation, lines, main, say

NAMES = {"train": ("train",), "valid": ("valid", "dev", "val"), "test": ("test",)}
# sacreBLEU's tokenizers of languages that write without blanks, and the module that one needs; else 13a
TOKENIZERS = {"ja": ("ja-mecab", "MeCab"), "ko": ("ko-mecab", "mecab_ko"), "zh": ("zh", "sacrebleu")}
TOKENIZERS.update({language: ("char", "sacrebleu") for language in ("th", "lo", "km", "my", "bo", "dz")})


class Own(Translation):
    script = __file__

    def check(self) -> None:
        super().check()
        config = self.config
        for split in SPLITS:
            files = config[split]
            if files and (len(files) != 2 or not all(Path(file).is_file() for file in files)):
                raise Refused(
                    f"{split} is {','.join(files)}, but must be two files, as {split}=text.en,text.de"
                )
        if bool(config["train"]) == (self.data is not None):
            raise Refused(
                "give either train=FILE,FILE or --data DIR, with train.LANGUAGE in it for each language"
            )
        languages = config["languages"]
        if len(languages) == 1 and languages[0].count("-") == 1:
            languages = languages[0].split("-")
        if not languages and config["train"]:
            languages = [name(Path(file)).rpartition(".")[2] for file in config["train"]]
        plain = all(language.replace("_", "").isalnum() for language in languages)
        if len(languages) != 2 or len(set(languages)) != 2 or not plain:
            raise Refused(
                f"languages is {','.join(languages)}, but must be two different ones, as languages=en-ja"
            )
        config["languages"] = languages
        if config["tokenizer"] is not None:
            from sacrebleu.metrics.bleu import BLEU

            self.choose("tokenizer", BLEU.TOKENIZERS)
            module = dict(TOKENIZERS.values()).get(config["tokenizer"], "sacrebleu")
            if importlib.util.find_spec(module) is None:
                raise Refused(f"tokenizer is {config['tokenizer']}, which needs the module {module}")

    @property
    def languages(self) -> Tuple[str, str]:
        return tuple(self.config["languages"])

    def files(self) -> Dict[str, Path]:
        """Return the files of each split that is given."""
        found = {}
        for split in SPLITS:
            paths = [Path(file) for file in self.config[split]]
            if self.data is not None and not paths:
                for known in NAMES[split]:
                    both = [self.data / f"{known}.{language}" for language in self.languages]
                    both = [path for x in both for path in (x, Path(f"{x}.gz")) if path.is_file()]
                    sides = {name(path).rpartition(".")[2]: path for path in reversed(both)}
                    if len(sides) == 1:
                        raise Refused(f"{both[0]} exists, but not in the other language")
                    paths = paths or [sides[language] for language in self.languages if sides]
            found.update({f"{split}.{x}": path for x, path in zip(self.languages, paths)})
        if "train." + self.languages[0] not in found:
            raise Refused(f"{self.data} has no train.{self.languages[0]} and train.{self.languages[1]}")
        return found

    def side(self, split: str, language: str) -> Iterator[Line]:
        return lines(self.files()[f"{split}.{language}"])

    def text_settings(self) -> Dict[str, Any]:
        return {**super().text_settings(), "held_out": self.config["held_out"]}

    def write_text(self, part: Path) -> None:
        """Write train, valid and test. Sets that are not given are taken from the training text.

        A hash of the sentence decides which ones. All pairs with such a source leave the training text, and
        the first of them is held out.
        """
        given = [split for split in SPLITS if f"{split}.{self.languages[0]}" in self.files()]
        missing = [split for split in SPLITS if split not in given]
        pairs = list(self.pairs("train"))
        sources = dict.fromkeys(source.strip() for source, _ in pairs)
        if missing:
            size = min(self.config["held_out"], len(sources) // 20)
            if not size:
                least = (
                    "20 different sentences are needed"
                    if self.config["held_out"]
                    else "held_out must be positive"
                )
                raise Refused(
                    f"there are {len(sources)} different sentences to take {missing[0]} from, but {least}"
                )
            order = sorted(sources, key=lambda source: hashlib.sha256(source.encode("utf-8")).digest())
            for i, split in enumerate(missing):
                sources.update(dict.fromkeys(order[i * size : (i + 1) * size], split))
        for split in SPLITS:
            if split in missing:
                held = {
                    pair[0].strip(): pair for pair in reversed(pairs) if sources[pair[0].strip()] == split
                }
                self.write(part / "text", split, reversed(list(held.values())))
            elif split == "train":
                self.write(part / "text", split, (pair for pair in pairs if sources[pair[0].strip()] is None))
            else:
                kept = list(self.pairs(split))
                self.write(part / "text", split, kept)
                seen = sum(source.strip() in sources for source, _ in kept)
                if seen:
                    say(f"   {split}: {seen} of {len(kept)} sentences are in the training text, too")

    def tokenizer(self) -> List[str]:
        found = self.config["tokenizer"]
        if found is None:
            found, module = TOKENIZERS.get(self.languages[1].split("_")[0].lower(), ("13a", "sacrebleu"))
            if importlib.util.find_spec(module) is None:
                found = "char"
        return ["--tokenize", found]

    def close(self) -> None:
        super().close()
        for model in self.config["models"]:
            run = self.run(model)
            words: Sequence[Any] = ["fairseq-interactive", "bin", *self.search(run), "--path"]
            words = [*words, f"{run.folder}/checkpoint_{self.translator()}.pt", "--bpe", "sentencepiece"]
            words = [*words, "--sentencepiece-model", "subwords/spm.model"]
            command = " ".join(shlex.quote(str(word)) for word in words)
            print(f"\nTo translate with {run.name}, lines from the standard input:\n")
            print(f"cd {shlex.quote(str(self.work.folder))} && {command} | grep ^D- | cut -f 3")


def name(path: Path) -> str:
    """Return a file's name without .gz."""
    return path.name[:-3] if path.name.endswith(".gz") else path.name


if __name__ == "__main__":
    main(Own)
