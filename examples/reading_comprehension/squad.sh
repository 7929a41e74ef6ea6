#!/usr/bin/env bash
# Reading comprehension with each recurrent unit, from JSON to exact match and F1; README.md explains the settings.
#   bash squad.sh [CELL ...] [-- fairseq-train option ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

dataset=${DATASET:-xquad}       # xquad or squad
work=${WORK:-$dataset}          # folder for everything this script writes
max_epoch=${MAX_EPOCH:-15}
export PYTHONPATH=$(dirname "$user_dir")${PYTHONPATH:+:$PYTHONPATH}

case $dataset in
  xquad)
    files=(xquad.en.json) splits=(train valid test) source=${XQUAD:-}
    url=https://raw.githubusercontent.com/google-deepmind/xquad/7d30520c717524000f0d9d2f9c10a069acd9d285 ;;
  squad)
    files=(train-v1.1.json dev-v1.1.json) splits=(train valid) source=${SQUAD:-}
    url=https://rajpurkar.github.io/SQuAD-explorer/dataset ;;
  *) die "DATASET is $dataset, but must be xquad or squad" ;;
esac

choose "$@"

prepare() {
  step "JSON"
  [[ -z $source || -d $source ]] || die "${dataset^^}=$source is not a folder"
  mkdir -p "$work/raw"
  echo '*' > "$work/.gitignore"
  local file split articles
  for file in "${files[@]}"; do
    [[ ! -e $work/raw/$file ]] || continue
    if [[ -z $source ]]; then
      curl -fsSL --retry 3 "$url/$file" -o "$work/raw/$file.part"
    else
      [[ -e $source/$file ]] || die "no $file in ${dataset^^}=$source"
      cp "$source/$file" "$work/raw/$file.part"
    fi
    mv "$work/raw/$file.part" "$work/raw/$file"
  done

  step "splits"
  if [[ ! -d $work/json ]]; then
    mkdir -p "$work/json.part"
    if [[ $dataset == xquad ]]; then
      python "$examples/reading_comprehension/split.py" "$work/raw/xquad.en.json" "$work/json.part"
    else
      cp "$work/raw/train-v1.1.json" "$work/json.part/train.json"
      cp "$work/raw/dev-v1.1.json" "$work/json.part/valid.json"
    fi
    mv "$work/json.part" "$work/json"
  fi

  step "tokens"
  if [[ ! -d $work/bin ]]; then
    python "$examples/reading_comprehension/squad.py" "$work/json" "$work/bin.part" >&2
    mv "$work/bin.part" "$work/bin"
  fi
}

train() {  # train CELL
  fairseq-train "$work/bin" --user-dir "$user_dir" --task reading_comprehension --arch lrn_reader --cell "$1" \
    --encoder-embed-dim 64 --encoder-hidden-size 32 --char-embed-dim 16 --dropout 0 \
    --criterion cross_entropy --optimizer adam --lr 0.004 --clip-norm 5 \
    --batch-size 16 --required-batch-size-multiple 1 --max-epoch "$max_epoch" --seed 1 \
    --best-checkpoint-metric f1 --maximize-best-checkpoint-metric --no-epoch-checkpoints \
    --save-dir "$work/$1" --num-workers 0 --log-format simple --log-interval 10 "${extra[@]}" |
    tee -a "$work/$1/train.log" >&2
}

validate() {  # validate CHECKPOINT
  fairseq-validate "$work/bin" --user-dir "$user_dir" --task reading_comprehension --path "$1" \
    --valid-subset "$(IFS=,; echo "${splits[*]}")" --batch-size 32 --required-batch-size-multiple 1 \
    --num-workers 0 --log-format simple
}

prepare

for cell in "${cells[@]}"; do
  folder=$work/$cell
  step "training $cell"
  once "$folder" "MAX_EPOCH=$max_epoch ${extra[*]}" train "$cell"

  step "evaluating $cell"
  if [[ ! $folder/validate.log -nt $folder/trained ]]; then
    validate "$folder/checkpoint_last.pt" > "$folder/validate.part"
    mv "$folder/validate.part" "$folder/validate.log"
  fi

  step "answers of $cell"
  if [[ ! $folder/answers.json -nt $folder/trained ]]; then
    python "$examples/reading_comprehension/predict.py" "$folder/checkpoint_last.pt" "$work/bin" "${splits[-1]}" \
      "$folder/answers.json.part"
    mv "$folder/answers.json.part" "$folder/answers.json"
  fi
done

step "table"
echo "| unit | parameters |$(printf ' %s EM | F1 |' "${splits[@]}") s/batch |"
echo "|---|---|$(printf -- '---|---|%.0s' "${splits[@]}")---|"
for cell in "${cells[@]}"; do
  row="| $cell | $(parameters "$work/$cell/train.log") |"
  for split in "${splits[@]}"; do
    for metric in em f1; do
      row+=" $(grep "| INFO | $split |" "$work/$cell/validate.log" | grep -o " $metric [0-9.]*" | cut -d ' ' -f 3) |"
    done
  done
  echo "$row $(seconds_per_update "$work/$cell/train.log") |"
done
