#!/usr/bin/env bash
# WMT14 English->German, from raw text to BLEU; README.md explains the settings.
#   bash wmt14.sh ARCH [fairseq-train option ...]
set -euo pipefail

dataset=WMT14 src=en tgt=de
work=${WORK:-wmt14}
max_update=${MAX_UPDATE:-100000}
vocab_size=${VOCAB_SIZE:-32000}
average=${AVERAGE:-5}
clean="250 1.5"
search=(--beam 4 --lenpen 0.6)
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

fetch() {
  local site=https://www.statmt.org
  download $site/wmt13/training-parallel-europarl-v7.tgz --strip-components 1 training/europarl-v7.de-en.{en,de}
  download $site/wmt13/training-parallel-commoncrawl.tgz commoncrawl.de-en.{en,de}
  download $site/wmt14/training-parallel-nc-v9.tgz --strip-components 1 training/news-commentary-v9.de-en.{en,de}
  newstest wmt13 newstest2013
  newstest wmt14/full newstest2014
}

newstest() {  # newstest SET NAME: a test set that sacreBLEU fetches
  sacrebleu -t "$1" -l en-de --echo src > "$work/download/$2.en"
  sacrebleu -t "$1" -l en-de --echo ref > "$work/download/$2.de"
}

original() {
  local corpus
  case $1 in
    train)
      for corpus in europarl-v7 commoncrawl news-commentary-v9; do
        text "$corpus.de-en.$2"
      done ;;
    valid) text "newstest2013.$2" ;;
    test) text "newstest2014.$2" ;;
  esac
}

train() {
  local share=--share-all-embeddings
  [[ $2 != deepnmt* ]] || share=--share-decoder-input-output-embed
  fairseq_train "$1" --arch "$2" "$share" --dropout 0.1 --clip-norm 1 \
    --lr 0.0007 --warmup-updates 4000 --update-freq 8 "${@:3}"
}

published_recipe "$@"
