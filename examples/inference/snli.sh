#!/usr/bin/env bash
# Natural language inference on SNLI with each recurrent unit, from text to accuracy; README.md explains the settings.
#   bash snli.sh [CELL ...] [-- fairseq-train option ...]
set -euo pipefail

dataset=SNLI
work=${WORK:-snli}
max_epoch=${MAX_EPOCH:-10}
min_count=${MIN_COUNT:-5}
options=(--arch lrn_inference --encoder-embed-dim 300 --encoder-hidden-size 300 --dropout 0.2
  --optimizer adam --lr 0.0005 --clip-norm 5 --batch-size 64)
source "$(dirname "${BASH_SOURCE[0]}")/../classification/recipe.sh"

fetched() {
  download https://nlp.stanford.edu/projects/snli/snli_1.0.zip
  unzip -p "$work/snli_1.0.zip" "snli_1.0/$1"
}

text() { original "snli_1.0_${1/valid/dev}.txt" | python "$examples/classification/words.py" snli "$raw/$1"; }

recipe "$@"
