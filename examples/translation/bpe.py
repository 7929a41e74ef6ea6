"""Joint sentencepiece BPE of RAW/train.*, applied to every file in RAW: python bpe.py RAW BPE VOCAB_SIZE."""

import sys
from pathlib import Path

import sentencepiece

raw, bpe, vocab_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
bpe.mkdir(parents=True, exist_ok=True)
sentencepiece.SentencePieceTrainer.train(
    input=sorted(map(str, raw.glob("train.*")), reverse=True),
    model_prefix=str(bpe / "spm"),
    model_type="bpe",
    vocab_size=vocab_size,
    character_coverage=1.0,
    minloglevel=1,
)
processor = sentencepiece.SentencePieceProcessor(model_file=str(bpe / "spm.model"))
for source in raw.iterdir():
    # As sacreBLEU reads: by default Python would end a line at a stray "\r" too, and make two of it.
    with open(source, encoding="utf-8", newline="\n") as lines:
        text = "".join(" ".join(processor.encode(line, out_type=str)) + "\n" for line in lines)
    (bpe / source.name).write_text(text, encoding="utf-8")
