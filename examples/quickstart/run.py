"""Train and try a small English-German translator, from nothing: python3 examples/quickstart/run.py.

Makes the project's environment and, in build/quickstart, a corpus, subwords, a model and translations. A
complete step is not repeated. Interrupted training continues from its last epoch.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import List

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environment import CONSTRAINTS, PACKAGE, ROOT, alone, enter, run, step  # noqa: E402

WORK = ROOT / "build" / "quickstart"
CORPUS, SUBWORDS, DATA = WORK / "corpus", WORK / "subwords", WORK / "data"
MODEL, OUTPUT = WORK / "model", WORK / "output"

PREPROCESS = ["fairseq-preprocess", "--source-lang", "en", "--target-lang", "de", "--joined-dictionary"]
PREPROCESS += ["--trainpref", SUBWORDS / "train", "--testpref", SUBWORDS / "test", "--destdir", DATA]
TRAIN = ["fairseq-train", DATA, "--user-dir", PACKAGE, "--save-dir", MODEL]
TRAIN += """--arch lrn_tiny --encoder-layers 2 --decoder-layers 2 --share-all-embeddings --dropout 0.1
    --word-dropout 0 --criterion cross_entropy --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1
    --lr 0.005 --lr-scheduler polynomial_decay --warmup-updates 200 --total-num-update 1200 --max-update 1200
    --max-tokens 1500 --disable-validation --no-epoch-checkpoints --num-workers 0
    --required-batch-size-multiple 1 --log-format simple --log-interval 50""".split()
TRANSLATE = ["fairseq-generate", DATA, "--user-dir", PACKAGE, "--path", MODEL / "checkpoint_last.pt"]
# No beam: fairseq's search ends when it is full of finished hypotheses, of a sure model mostly wrong ones.
TRANSLATE += """--beam 1 --max-len-a 2 --max-len-b 20 --batch-size 100 --remove-bpe sentencepiece
    --num-workers 0 --required-batch-size-multiple 1 --log-format simple --log-interval 2""".split()


def read(path: Path) -> List[str]:
    """Return the lines of a text file."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def split() -> None:
    """Learn joint subwords from the training set and split the corpus into them, numbers into digits."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(read(CORPUS / "train.en") + read(CORPUS / "train.de")),
        model_prefix=str(SUBWORDS / "spm"),
        vocab_size=1500,
        character_coverage=1.0,
        split_digits=True,
        minloglevel=1,
    )
    subwords = SentencePieceProcessor(model_file=str(SUBWORDS / "spm.model"))
    for path in CORPUS.glob("*.??"):
        lines = subwords.encode(read(path), out_type=str)
        (SUBWORDS / path.name).write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")


def report() -> None:
    """Print held-out sentences with reference and translation, BLEU, and the share translated exactly."""
    from sacrebleu.metrics import BLEU

    sources, references = read(CORPUS / "test.en"), read(CORPUS / "test.de")
    lines = [line.split("\t") for line in read(OUTPUT / "log") if line.startswith("D-")]
    numbered = {int(number[2:]): text for number, _, text in lines}
    if len(lines) != len(sources) or sorted(numbered) != list(range(len(sources))):
        sys.exit(f"{len(sources)} sentences were to be translated, but there are {len(lines)} translations")
    translations = [numbered[number] for number in range(len(sources))]
    triples = list(zip(sources, references, translations))
    wrong = [triple for triple in triples if triple[1] != triple[2]]
    for title, some in (
        ("Some held-out sentences", triples[:8]),
        ("Some of those not translated exactly", wrong[:4]),
    ):
        print(f"\n{title}:")
        for source, reference, translation in some:
            print(f"\n  English      {source}\n  reference    {reference}\n  translation  {translation}")
    bleu = BLEU()
    print(f"\n{bleu.corpus_score(translations, [references])}\n{bleu.get_signature()}")
    print(f"{1 - len(wrong) / len(triples):.1%} of {len(triples)} held-out sentences translated exactly")


def main() -> None:
    """Do all steps that are not done yet, and report."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a model so small gains little from threads
    this, maker = Path(__file__), HERE / "make_corpus.py"
    code = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"))
    corpus = [sys.executable, maker, CORPUS]
    progress = r"epoch \d+:.*num_updates=\d+"
    step("Make a corpus", CORPUS, [maker, CONSTRAINTS], lambda: run(corpus, CORPUS / "log"))
    step("Split it into subwords", SUBWORDS, [this, CORPUS], split)
    step("Preprocess it", DATA, [this, SUBWORDS], lambda: run(PREPROCESS, DATA / "log", r"\[.*"))
    step("Train", MODEL, [this, DATA, *code], lambda: run(TRAIN, MODEL / "log", progress), resumes=True)
    step("Translate", OUTPUT, [this, DATA, MODEL], lambda: run(TRANSLATE, OUTPUT / "log", "Translated .*"))
    report()


if __name__ == "__main__":
    enter(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    with alone("quickstart"):
        main()
