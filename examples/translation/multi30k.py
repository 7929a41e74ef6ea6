"""Multi30K English→German, from raw text to BLEU; README.md explains the settings of multi30k.yaml."""

from typing import Iterator, List

from translation import Line, Translation
from recipe import lines, main  # after translation, which finds it


class Multi30K(Translation):
    script = __file__
    files_of = {"train": "train", "valid": "val", "test": "test_2016_flickr"}

    def names(self) -> List[str]:
        return [f"{name}.{language}" for name in self.files_of.values() for language in self.languages]

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/{name}.gz" for name in self.names()]

    def side(self, split: str, language: str) -> Iterator[Line]:
        return lines(self.find(f"{self.files_of[split]}.{language}"))


if __name__ == "__main__":
    main(Multi30K)
