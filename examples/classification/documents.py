"""Document classification (Zhang et al., NeurIPS 2015) with each recurrent unit; see README.md."""

import csv
import sys
from typing import Any, Dict, Iterator, List

from sentences import Line, Refused, Row, Sentences, lines, main, words

DATASETS = ("amazon_review_polarity", "yahoo_answers", "amazon_review_full", "yelp_review_polarity")


class Documents(Sentences):
    script = __file__

    def check(self) -> None:
        super().check()
        self.choose("corpus", DATASETS)

    def work_name(self) -> str:
        return self.config["corpus"]

    def names(self) -> List[str]:
        return ["train.csv", "test.csv"]

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/{self.config['corpus']}_csv.tgz"]

    def text_settings(self) -> Dict[str, Any]:
        return {"corpus": self.config["corpus"]}

    def rows(self, split: str) -> Iterator[Row]:
        """Yield rows of label and text. Every hundredth row of the training file is for validation."""
        count = 0
        for count, row in enumerate(self.documents("test.csv" if split == "test" else "train.csv"), 1):
            if split == "test" or (count % 100 == 0) == (split == "valid"):
                yield row
        if split == "valid" and count < 100:
            raise Refused(
                f"{self.find('train.csv')} has {count} documents, but needs 100: each 100th validates"
            )

    def documents(self, name: str) -> Iterator[Row]:
        """Yield the rows of a file of comma-separated label, title and text."""
        path, begun = self.find(name), 1
        csv.field_size_limit(sys.maxsize)
        # within a line a carriage return is white space, which the words do without
        reader = csv.reader((line.text.replace("\r", " ") + "\n" for line in lines(path)), strict=True)
        try:
            for columns in reader:
                line, begun = Line(path, begun, ""), reader.line_num + 1
                if not columns:
                    continue
                self.columns = getattr(self, "columns", len(columns))
                if len(columns) != self.columns or len(columns) < 2:
                    raise line.refuse(f"there are {len(columns)} columns, but must be {max(self.columns, 2)}")
                yield Row(line, columns[0], [words(" ".join(columns[1:]).replace("\\n", " "))])
        except csv.Error as error:
            raise Refused(f"{path}, line {begun}: {error}") from error


if __name__ == "__main__":
    main(Documents)
