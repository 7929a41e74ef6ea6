#!/usr/bin/env bash
# Natural language inference on SICK with each recurrent unit, from text to accuracy; README.md explains the settings.
#   bash sick.sh [CELL ...] [-- fairseq-train option ...]
set -euo pipefail

dataset=SICK
work=${WORK:-sick}
max_epoch=${MAX_EPOCH:-10}
min_count=${MIN_COUNT:-1}
options=(--arch lrn_inference --encoder-embed-dim 100 --encoder-hidden-size 100 --dropout 0.2
  --optimizer adam --lr 0.001 --clip-norm 5 --batch-size 32)
source "$(dirname "${BASH_SOURCE[0]}")/../classification/recipe.sh"

url=https://raw.githubusercontent.com/brmson/dataset-sts/e1d3375f5b3bc24f21aa4e46f96eb379e9fc1081/data/sts/sick2014

fetched() { curl -fsSL --retry 3 "$url/$1"; }

text() {
  local -A names=([train]=train [valid]=trial [test]=test_annotated)
  original "SICK_${names[$1]}.txt" | python "$examples/classification/words.py" sick "$raw/$1"
}

recipe "$@"
