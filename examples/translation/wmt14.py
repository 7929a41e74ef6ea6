"""WMT14 English→German, from raw text to BLEU; README.md explains the settings of wmt14.yaml."""

import shutil
from pathlib import Path
from typing import Iterator, List

from translation import Line, Translation, lines, main

CORPORA = {
    "train": ("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v9.de-en"),
    "valid": ("newstest2013",),
    "test": ("newstest2014",),
}
TEST_SETS = {"newstest2013": "wmt13", "newstest2014": "wmt14/full"}  # as sacreBLEU calls them


class WMT14(Translation):
    script = __file__
    published = True

    def names(self) -> List[str]:
        return [f"{name}.{x}" for split in CORPORA for name in CORPORA[split] for x in self.languages]

    def urls(self) -> List[str]:
        return self.config["urls"]

    def unpack(self, part: Path) -> Path:
        """Unpack the training text from the archives, and get the news from sacreBLEU, which fetches it."""
        from sacrebleu.utils import get_reference_files, get_source_file

        folder = super().unpack(part)
        for name, known in TEST_SETS.items():
            shutil.copy(get_source_file(known, "en-de"), folder / f"{name}.en")
            shutil.copy(get_reference_files(known, "en-de")[0], folder / f"{name}.de")
        return folder

    def side(self, split: str, language: str) -> Iterator[Line]:
        for name in CORPORA[split]:
            yield from lines(self.find(f"{name}.{language}"))


if __name__ == "__main__":
    main(WMT14)
