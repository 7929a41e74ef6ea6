"""Multi30K English→German, from raw text to BLEU; README.md explains the settings of multi30k.yaml."""

from typing import Iterator, List

from translation import Line, Translation, lines, main

FILES = {"train": "train", "valid": "val", "test": "test_2016_flickr"}


class Multi30K(Translation):
    script = __file__

    def names(self) -> List[str]:
        return [f"{name}.{language}" for name in FILES.values() for language in self.languages]

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/{name}.gz" for name in self.names()]

    def side(self, split: str, language: str) -> Iterator[Line]:
        return lines(self.find(f"{FILES[split]}.{language}"))


if __name__ == "__main__":
    main(Multi30K)
