#!/usr/bin/env bash
# The paper's document classification (Zhang et al., NeurIPS 2015) with each recurrent unit; see README.md.
#   DATASET=NAME bash documents.sh [CELL ...] [-- fairseq-train option ...]
# NAME: amazon_review_polarity, yahoo_answers, amazon_review_full or yelp_review_polarity
set -euo pipefail

dataset=CSV
name=${DATASET:-yelp_review_polarity}
work=${WORK:-$name}
max_epoch=${MAX_EPOCH:-5}
min_count=${MIN_COUNT:-5}
options=(--arch lrn_classifier --encoder-embed-dim 300 --encoder-hidden-size 64 --dropout 0.2
  --optimizer adam --lr 0.001 --clip-norm 5 --batch-size 64 --max-positions 512 --shorten-method truncate)
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

fetched() {
  download "https://s3.amazonaws.com/fast-ai-nlp/${name}_csv.tgz"
  tar -xzOf "$work/${name}_csv.tgz" "${name}_csv/$1"
}

text() {  # every hundredth training document is for validation
  local part
  [[ $1 != valid ]] || return 0
  original "$1.csv" | python "$examples/classification/words.py" documents "$raw/$1"
  [[ $1 == train ]] || return 0
  for part in label input0; do
    mv "$raw/train.$part" "$raw/all"
    awk -v train="$raw/train.$part" -v valid="$raw/valid.$part" '{ print > (NR % 100 ? train : valid) }' "$raw/all"
  done
}

recipe "$@"
