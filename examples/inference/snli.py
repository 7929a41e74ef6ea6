"""Natural language inference on SNLI with each recurrent unit, from text to accuracy; README.md explains."""

from typing import List

from pairs import Pairs, main


class SNLI(Pairs):
    script = __file__
    columns = ("gold_label", "sentence1", "sentence2")
    files_of = ("snli_1.0_train.txt", "snli_1.0_dev.txt", "snli_1.0_test.txt")
    optional = "label2"

    def urls(self) -> List[str]:
        return [self.config["url"]]


if __name__ == "__main__":
    main(SNLI)
