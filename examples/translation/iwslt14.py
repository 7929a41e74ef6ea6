"""IWSLT14 German→English, from raw text to BLEU; README.md explains the settings of iwslt14.yaml."""

import re
from typing import Iterator, List

from translation import Line, Translation, lines, main

TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
BLANKS = " \t\v\f\r"


class IWSLT14(Translation):
    script = __file__
    published = True

    def names(self) -> List[str]:
        return [
            *(f"train.tags.de-en.{language}" for language in self.languages),
            *(f"IWSLT14.{test}.de-en.{language}.xml" for test in TESTS for language in self.languages),
        ]

    def urls(self) -> List[str]:
        return [self.config["url"]]

    def side(self, split: str, language: str) -> Iterator[Line]:
        """Yield the talks' sentences, titles and descriptions, each 23rd for validation, or those of the
        tests."""
        if split == "test":
            for test in TESTS:
                for line in lines(self.find(f"IWSLT14.{test}.de-en.{language}.xml")):
                    segment = re.match(r".*<seg id[^>]*>(.*?)(</seg>.*)?$", line.text, re.S)
                    if segment:
                        yield line._replace(text=segment[1].strip(BLANKS).replace("\u2019", "'"))
            return
        count = 0
        for line in lines(self.find(f"train.tags.de-en.{language}")):
            if not any(tag in line.text for tag in ("<url>", "<talkid>", "<keywords>")):
                count += 1
                if (count % 23 == 0) == (split == "valid"):
                    yield line._replace(text=re.sub("</?(title|description)>", "", line.text).strip(BLANKS))


if __name__ == "__main__":
    main(IWSLT14)
