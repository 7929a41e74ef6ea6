"""A translator from your own text, two files of any two languages, from raw text to BLEU; see README.md."""

import hashlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from translation import SPLITS, Line, Refused, Translation, expand, lines, main, program, say

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
            files = config[split] = [str(expand(file)) for file in config[split]]
            if len(files) not in (0, 2):
                raise Refused(
                    f"{split} is {','.join(files)}, but must be two files, as {split}=text.en,text.de"
                )
            for file in files:
                if not Path(file).is_file():
                    raise Refused(f"{split} is {','.join(files)}, but there is no file {file}")
        if bool(config["train"]) == (self.data is not None):
            raise Refused(
                "give either train=FILE,FILE or --data DIR, with train.LANGUAGE in it for each language"
            )
        languages = config["languages"]
        if len(languages) == 1 and languages[0].count("-") == 1:
            languages = languages[0].split("-")
        languages = config["languages"] = languages or ends(config["train"])
        plain = all(language.replace("_", "").isalnum() for language in languages)
        if len(set(languages)) != 2 or len(languages) != 2 or not plain:
            given = ",".join(languages) or "not given, and no names of files end in two"
            raise Refused(f"languages is {given}, but must be two different ones, as languages=en-ja")
        for split in SPLITS:
            files = config[split]
            found = [next((x for x in reversed(parts(file)) if x in languages), None) for file in files]
            if len(set(found)) == 1 and found[0]:
                raise Refused(f"{split} is {','.join(files)}, but both names end in {found[0]}")
            if any(x not in (None, language) for x, language in zip(found, languages)):
                config[split] = files[::-1]
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
                    sides = {parts(path)[-1]: path for path in reversed(both)}
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
            words = [program("fairseq-interactive"), "bin", *self.search(run), "--path", self.checkpoint(run)]
            words += ["--bpe", "sentencepiece", "--sentencepiece-model", "subwords/spm.model"]
            words += ["--buffer-size", 1024, "--batch-size", 128]
            command = " ".join(shlex.quote(str(word)) for word in words)
            print(f"\nTo translate a file with {run.name}, put its name for FILE:\n")
            # in the folder, as fairseq splits paths at colons; in parentheses, for FILE to be in the user's
            command += " 2> logs/interactive.log | grep ^D- | cut -f 3"
            print(f"(cd {shlex.quote(str(self.work.folder))} && {command}) < FILE")


def parts(path: Any) -> List[str]:
    """Return what is after the dots of a file's name, without gz."""
    found = Path(path).name.split(".")[1:]
    return found[:-1] if found[-1:] == ["gz"] else found


def ends(files: Sequence[str]) -> List[str]:
    """Return the last parts that differ: en and ja of talk.en and talk.ja, or talk.en.txt and talk.ja.txt."""
    for last, *pair in zip([True, False, False], *(reversed(parts(file)) for file in files)):
        if len(set(pair)) > 1 and (last or all(re.fullmatch("[A-Za-z]{2,3}(_[A-Za-z]+)?", x) for x in pair)):
            return pair
    return []


if __name__ == "__main__":
    main(Own)
