"""Joint sentencepiece BPE of RAW/train.*, applied to RAW's train, valid and test.

    python bpe.py RAW BPE VOCAB_SIZE [MAX_LENGTH MAX_RATIO]

With limits, training pairs are left out that have an empty side, a side of more than MAX_LENGTH pieces, or a
side that is more than MAX_RATIO times as long as the other.
"""

import sys
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import sentencepiece

raw, bpe, vocab_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
limits = [float(word) for word in sys.argv[4:]]
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
for split in ("train", "valid", "test"):
    sources = sorted(raw.glob(f"{split}.*"))
    total = kept = 0
    with ExitStack() as stack:
        # As sacreBLEU reads: by default Python would end a line at a stray "\r" too, and make two of it.
        texts = [stack.enter_context(open(path, encoding="utf-8", newline="\n")) for path in sources]
        outputs = [stack.enter_context(open(bpe / path.name, "w", encoding="utf-8")) for path in sources]
        for lines in zip_longest(*texts):
            if None in lines:
                raise ValueError(
                    f"{sources[lines.index(None)]} ends after line {total}, {split}'s other side does not"
                )
            total += 1
            pair = [processor.encode(line, out_type=str) for line in lines]
            shorter, longer = sorted(map(len, pair))
            if limits and split == "train":
                max_length, max_ratio = limits
                if shorter == 0 or longer > max_length or longer > max_ratio * shorter:
                    continue
            kept += 1
            for pieces, output in zip(pair, outputs):
                output.write(" ".join(pieces) + "\n")
    print(f"{split}: {kept} of {total} pairs", file=sys.stderr)
