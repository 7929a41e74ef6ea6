#!/usr/bin/env bash
# Multi30K English->German, from raw text to BLEU; README.md explains the settings.
#   bash multi30k.sh ARCH [fairseq-train option ...]   prepare the data, train, translate and score
#   bash multi30k.sh compare RUN ...                   scores and speeds of trained models, side by side
# ARCH is lrn_tiny, any other architecture of fairseq, or "transformer" for fairseq's in the same small form.
set -euo pipefail

dataset=MULTI30K src=en tgt=de
work=${WORK:-multi30k}               # folder for everything this script writes
max_update=${MAX_UPDATE:-3500}       # 0: no limit
vocab_size=${VOCAB_SIZE:-8000}
average=${AVERAGE:-10}               # translate with the mean of the last so many epochs, at most 10; 0: the best one
speed_updates=${SPEED_UPDATES:-40}   # updates of each timed training in "compare", a multiple of 4
rounds=${ROUNDS:-3}                  # of timed training and translating in "compare"
clean=
search=(--beam 5)
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

url=https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw

fetch() {
  local file lang
  for file in train val test_2016_flickr; do
    for lang in en de; do
      download "$url/$file.$lang.gz"
    done
  done
}

original() {
  case $1 in
    train) text "train.$2" ;;
    valid) text "val.$2" ;;
    test) text "test_2016_flickr.$2" ;;
  esac
}

train() {
  local folder=$1 arch=$2
  shift 2
  local model=(--arch "$arch")
  if [[ $arch == transformer ]]; then
    model=(--arch transformer_iwslt_de_en --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256
      --encoder-attention-heads 4 --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256
      --decoder-attention-heads 4)
  fi
  fairseq_train "$folder" "${model[@]}" --share-all-embeddings --dropout 0.3 \
    --lr 0.005 --warmup-updates 2000 "$@"
}

compare() {
  local logs=$work/compare interval=$((speed_updates / 4)) run round model parameters bleu chrf words sentences
  for run; do
    [[ -e $work/$run/$name.de ]] || die "no $work/$run/$name.de: train and translate with RUN=$run first"
  done
  export CUDA_VISIBLE_DEVICES=  # speeds are of the CPU
  rm -rf "$logs"
  mkdir -p "$logs"
  for ((round = 1; round <= rounds; round++)); do
    for run; do
      step "speed of $run, round $round of $rounds"
      read -ra model < "$work/$run/settings"
      train "$logs" "${model[@]:1}" --max-update "$speed_updates" --log-interval "$interval" \
        --no-save --disable-validation >> "$logs/$run.train"
      translate "$work/$run/checkpoint_$name.pt" "$logs/$run.generate$round"
    done
  done

  step "table"
  echo "| model | parameters | BLEU | chrF | training words/s | sentences/s, beam 5 |"
  echo "|---|---|---|---|---|---|"
  for run; do
    parameters=$(parameters "$logs/$run.train")
    bleu=$(sacrebleu "$work/raw/test.de" -i "$work/$run/$name.de" -m bleu -b -w 1)
    chrf=$(sacrebleu "$work/raw/test.de" -i "$work/$run/$name.de" -m chrf -b -w 1)
    # The first interval warms up.
    words=$(grep train_inner "$logs/$run.train" | grep -v "num_updates=$interval," |
      grep -o 'wps=[0-9.]*' | cut -d = -f 2 | median)
    sentences=$(grep -ho '[0-9.]* sentences/s' "$logs/$run".generate*.log | cut -d ' ' -f 1 | median)
    echo "| $run | $parameters | $bleu | $chrf | $words | $sentences |"
  done
}

[[ -n ${1:-} && $* != compare ]] ||
  die "usage: bash multi30k.sh ARCH [fairseq-train option ...], or: bash multi30k.sh compare RUN ..."
if [[ $1 == compare ]]; then
  compare "${@:2}"
else
  recipe "$@"
fi
