#!/usr/bin/env bash
# Multi30K English->German, from raw text to BLEU; README.md explains the settings.
#   bash multi30k.sh ARCH [fairseq-train option ...]   prepare the data, train, translate and score
#   bash multi30k.sh compare RUN ...                   scores and speeds of trained models, side by side
# ARCH is lrn_tiny, any other architecture of fairseq, or "transformer" for fairseq's in the same small form.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

work=${WORK:-multi30k}               # folder for everything this script writes
run=${RUN:-${1:-}}                   # folder of this training run, in $work
max_update=${MAX_UPDATE:-3500}       # 0: no limit
vocab_size=${VOCAB_SIZE:-8000}
average=${AVERAGE:-10}               # translate with the mean of the last so many epochs, at most 10; 0: the best one
speed_updates=${SPEED_UPDATES:-40}   # updates of each timed training in "compare", a multiple of 4
rounds=${ROUNDS:-3}                  # of timed training and translating in "compare"
name=best                            # of the checkpoint that translates
[[ $average == 0 ]] || name=average$average

url=https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw

prepare() {
  step "raw text"
  [[ -z ${MULTI30K:-} || -d $MULTI30K ]] || die "MULTI30K=$MULTI30K is not a folder"
  mkdir -p "$work/raw"
  echo '*' > "$work/.gitignore"
  local names split name lang source target
  for names in train:train valid:val test:test_2016_flickr; do
    split=${names%:*} name=${names#*:}
    for lang in en de; do
      target=$work/raw/$split.$lang
      [[ ! -e $target ]] || continue
      if [[ -z ${MULTI30K:-} ]]; then
        curl -fsSL --retry 3 "$url/$name.$lang.gz" | gzip -dc > "$target.part"
      else
        source=$MULTI30K/$name.$lang
        [[ -e $source ]] || source+=.gz
        [[ -e $source ]] || die "neither $name.$lang nor $name.$lang.gz in MULTI30K=$MULTI30K"
        gzip -dcf "$source" > "$target.part"  # -f: what is not compressed passes as it is
      fi
      mv "$target.part" "$target"
    done
  done

  step "sentencepiece"
  if [[ ! -d $work/bpe ]]; then
    python "$examples/translation/bpe.py" "$work/raw" "$work/bpe.part" "$vocab_size"
    mv "$work/bpe.part" "$work/bpe"
  fi

  step "fairseq-preprocess"
  if [[ ! -d $work/bin ]]; then
    fairseq-preprocess -s en -t de --trainpref "$work/bpe/train" --validpref "$work/bpe/valid" \
      --testpref "$work/bpe/test" --joined-dictionary --destdir "$work/bin.part"
    mv "$work/bin.part" "$work/bin"
  fi
}

train() {  # train FOLDER ARCH [option ...]
  local folder=$1 arch=$2
  shift 2
  local model=(--arch "$arch")
  if [[ $arch == transformer ]]; then
    model=(--arch transformer_iwslt_de_en --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256
      --encoder-attention-heads 4 --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256
      --decoder-attention-heads 4)
  fi
  fairseq-train "$work/bin" --user-dir "$user_dir" --task translation -s en -t de \
    "${model[@]}" --share-all-embeddings --dropout 0.3 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' \
    --lr 0.005 --lr-scheduler inverse_sqrt --warmup-updates 2000 --warmup-init-lr 1e-7 \
    --max-tokens 4096 --required-batch-size-multiple 1 --max-update "$max_update" --seed 1 \
    --save-dir "$folder" --keep-last-epochs 10 --num-workers 0 --log-format simple --log-interval 20 "$@"
}

translate() {  # translate CHECKPOINT OUTPUT; fairseq's messages go to OUTPUT.log
  fairseq-generate "$work/bin" --user-dir "$user_dir" --task translation -s en -t de --path "$1" \
    --beam 5 --remove-bpe sentencepiece --batch-size 128 --required-batch-size-multiple 1 \
    > "$2" 2> "$2.log" || { tail -n 20 "$2.log" >&2; die "fairseq-generate failed, see $2.log"; }
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
      read -ra model < "$work/$run/trained"
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
  exit
fi
prepare

step "training $run"
folder=$work/$run
if [[ ! -e $folder/trained || $(< "$folder/trained") != "$max_update $*" ]]; then
  mkdir -p "$folder"
  train "$folder" "$@" | tee -a "$folder/train.log"
  echo "$max_update $*" > "$folder/trained"
fi

if [[ $average != 0 ]]; then
  step "averaging $average checkpoints"
  [[ $folder/checkpoint_$name.pt -nt $folder/checkpoint_last.pt ]] ||
    PYTHONPATH=$(dirname "$user_dir")${PYTHONPATH:+:$PYTHONPATH} \
      python "$examples/translation/average.py" "$folder" "$average" "$folder/checkpoint_$name.pt"
fi

step "translating"
if [[ ! $folder/$name.de -nt $folder/checkpoint_$name.pt ]]; then
  translate "$folder/checkpoint_$name.pt" "$folder/$name.generate"
  grep '^D-' "$folder/$name.generate" | cut -c 3- | sort -n | cut -f 3- > "$folder/$name.de"
fi

step "scoring"
sources=$(awk 'END { print NR }' "$work/raw/test.en")
translations=$(awk 'END { print NR }' "$folder/$name.de")
[[ $sources -eq $translations ]] || die "$translations translations of $sources sentences"
sacrebleu "$work/raw/test.de" -i "$folder/$name.de" -m bleu chrf -f text -w 1
