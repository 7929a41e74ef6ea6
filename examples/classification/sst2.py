"""Sentiment of film reviews' sentences (SST-2) with each recurrent unit; see README.md."""

from typing import Iterator, List

from sentences import Row, Sentences, blanks, filled, lines, main


class SST2(Sentences):
    script = __file__

    def names(self) -> List[str]:
        return ["train.txt", "dev.txt", "test.txt"]

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/stsa.binary.{name}" for name in ("train", "dev", "test")]

    def rows(self, split: str) -> Iterator[Row]:
        """Yield lines "label words"."""
        name = "dev" if split == "valid" else split
        for line in filled(lines(self.find(f"{name}.txt" if self.data else f"stsa.binary.{name}"))):
            label, _, text = line.text.partition(" ")
            yield Row(line, label, [blanks(text)])


if __name__ == "__main__":
    main(SST2)
