#!/usr/bin/env bash
# IWSLT14 German->English, from raw text to BLEU; README.md explains the settings.
#   bash iwslt14.sh ARCH [fairseq-train option ...]
set -euo pipefail

dataset=IWSLT14 src=de tgt=en
work=${WORK:-iwslt14}
max_update=${MAX_UPDATE:-50000}
vocab_size=${VOCAB_SIZE:-10000}
average=${AVERAGE:-10}
clean="175 1.5"
search=(--beam 5)
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

fetch() { download https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz --strip-components 1; }

pairs() {  # pairs LANGUAGE: the talks' sentences, with their titles and descriptions
  text "train.tags.de-en.$1" | LC_ALL=C grep -av -e '<url>' -e '<talkid>' -e '<keywords>' |
    LC_ALL=C sed -E -e 's,</?(title|description)>,,g' -e 's/^[[:space:]]+|[[:space:]]+$//g'
}

original() {
  local set
  case $1 in
    train) pairs "$2" | awk 'NR % 23 != 0' ;;
    valid) pairs "$2" | awk 'NR % 23 == 0' ;;
    test)
      for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
        text "IWSLT14.$set.de-en.$2.xml"
      done | LC_ALL=C grep -a '<seg id' |
        LC_ALL=C sed -E -e 's,^.*<seg id[^>]*>[[:space:]]*,,' -e 's,[[:space:]]*</seg>.*$,,' -e "s/’/'/g" ;;
  esac
}

train() {
  fairseq_train "$1" --arch "$2" --share-all-embeddings --dropout 0.3 --weight-decay 0.0001 --clip-norm 1 \
    --lr 0.0005 --warmup-updates 4000 "${@:3}"
}

published_recipe "$@"
