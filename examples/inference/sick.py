"""Natural language inference on SICK with each recurrent unit, from text to accuracy; README.md explains."""

from typing import List

from pairs import Pairs, main


class SICK(Pairs):
    script = __file__
    columns = ("entailment_judgment", "sentence_A", "sentence_B")
    files_of = ("SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt")

    def urls(self) -> List[str]:
        return [f"{self.config['url']}/{name}" for name in self.files_of]


if __name__ == "__main__":
    main(SICK)
