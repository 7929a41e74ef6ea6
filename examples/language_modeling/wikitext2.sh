#!/usr/bin/env bash
# WikiText-2, from tokens to perplexity, for each recurrent unit; README.md explains the settings.
#   bash wikitext2.sh [CELL ...] [-- fairseq-train option ...]   prepare, train, evaluate, print a table
# CELL is lrn, olrn, lstm, gru, atr or sru; all six, if none is named.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

work=${WORK:-wikitext2}              # folder for everything this script writes
small=${SMALL:-}                     # 1: train on the validation text, validate and test on halves of the test text
max_epoch=${MAX_EPOCH:-8}

url=https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2

fetch() {  # fetch SPLIT TARGET
  local name
  if [[ -z ${WIKITEXT2:-} ]]; then
    curl -fsSL --retry 3 "$url/$1.txt" > "$2"
    return
  fi
  for name in "$1.txt" "wiki.$1.tokens"; do
    [[ ! -e $WIKITEXT2/$name ]] || { cp "$WIKITEXT2/$name" "$2"; return; }
  done
  die "neither $1.txt nor wiki.$1.tokens in WIKITEXT2=$WIKITEXT2"
}

prepare() {
  step "text"
  [[ -z ${WIKITEXT2:-} || -d $WIKITEXT2 ]] || die "WIKITEXT2=$WIKITEXT2 is not a folder"
  mkdir -p "$work"
  echo '*' > "$work/.gitignore"
  if [[ ! -d $work/raw ]]; then
    rm -rf "$work/raw.part"
    mkdir "$work/raw.part"
    if [[ -n $small ]]; then
      fetch valid "$work/raw.part/train"
      fetch test "$work/raw.part/both"
      # from the middle on, the first title of an article, " = Title = ", begins the second half
      awk -v half="$(awk 'END { print NR / 2 }' "$work/raw.part/both")" -v folder="$work/raw.part" \
        'NR > half && /^ *= [^=]* = *$/ { second = 1 } { print > (folder "/" (second ? "test" : "valid")) }' \
        "$work/raw.part/both"
      [[ -e $work/raw.part/test ]] || die "no article begins in the second half of the test text"
      rm "$work/raw.part/both"
    else
      for split in train valid test; do
        fetch $split "$work/raw.part/$split"
      done
    fi
    mv "$work/raw.part" "$work/raw"
  fi

  step "fairseq-preprocess"
  if [[ ! -d $work/bin ]]; then
    rm -rf "$work/bin.part"
    fairseq-preprocess --only-source --trainpref "$work/raw/train" --validpref "$work/raw/valid" \
      --testpref "$work/raw/test" --destdir "$work/bin.part"
    mv "$work/bin.part" "$work/bin"
  fi
}

train() {  # train CELL
  local activation=tanh
  [[ $1 != *lrn ]] || activation=identity
  fairseq-train "$work/bin" --user-dir "$user_dir" --task truncated_bptt_lm --arch lrn_lm --cell "$1" \
    --cell-activation $activation \
    --decoder-embed-dim 192 --decoder-hidden-size 192 --decoder-layers 2 --dropout 0.4 --embed-dropout 0.1 \
    --criterion adaptive_loss --adaptive-softmax-cutoff 2000,6000 --adaptive-softmax-dropout 0.2 \
    --ddp-backend legacy_ddp \
    --optimizer adam --lr 0.002 --force-anneal 4 --lr-shrink 0.5 --clip-norm 0.25 \
    --tokens-per-sample 35 --batch-size 20 --max-epoch "$max_epoch" --seed 1 \
    --save-dir "$work/$1" --no-epoch-checkpoints --num-workers 0 --log-format simple --log-interval 20 \
    "${extra[@]}" | tee -a "$work/$1/train.log"
}

perplexity() {  # perplexity CELL SPLIT; fairseq's messages go to CELL/SPLIT.log
  local log=$work/$1/$2.log
  if [[ ! $log -nt $work/$1/checkpoint_best.pt ]]; then
    rm -f "$log.part"
    log "$log.part" fairseq-eval-lm "$work/bin" --user-dir "$user_dir" --task truncated_bptt_lm --gen-subset "$2" \
      --path "$work/$1/checkpoint_best.pt" --tokens-per-sample 512 --num-workers 0
    mv "$log.part" "$log"
  fi
  grep -o 'Perplexity: .*' "$log" | cut -d ' ' -f 2
}

choose "$@"
prepare
for cell in "${cells[@]}"; do
  step "training $cell"
  once "$work/$cell" "MAX_EPOCH=$max_epoch ${extra[*]}" train "$cell"
  for split in valid test; do
    step "perplexity of $cell, $split"
    perplexity "$cell" $split > /dev/null
  done
done

step "table"
echo "| unit | parameters | validation perplexity | test perplexity | training s/batch |"
echo "|---|---|---|---|---|"
for cell in "${cells[@]}"; do
  log=$work/$cell/train.log
  echo "| $cell | $(parameters "$log") | $(perplexity "$cell" valid) | $(perplexity "$cell" test) |" \
    "$(seconds_per_update "$log") |"
done
