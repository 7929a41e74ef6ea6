# What the recipes of classification and inference share, to be sourced by one that sets
#   dataset       name of the variable that may hold a folder with the data
#   work          folder for everything that is written
#   max_epoch     epochs
#   min_count     words that are rarer in the training set are <unk>
#   options       of fairseq-train: the model, its sizes and its training
# and defines
#   fetched NAME  print a file of the dataset from where it is published
#   text SPLIT    write train, valid or test, a line a sentence: $raw/SPLIT.label, .input0 and, of pairs, .input1
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

download() {  # download URL: an archive, once, to $work
  local file=$work/${1##*/}
  [[ -e $file ]] || { curl -fsSL --retry 3 -o "$file.part" "$1" && mv "$file.part" "$file"; }
}

original() {  # original NAME: print a file of the dataset
  local folder=${!dataset:-}
  if [[ -z $folder ]]; then
    fetched "$1"
  else
    [[ -e $folder/$1 ]] || die "no $1 in $dataset=$folder"
    cat "$folder/$1"
  fi
}

prepare() {
  local bin=$work/bin.part split name dictionary
  step "raw text"
  [[ -z ${!dataset:-} || -d ${!dataset} ]] || die "$dataset=${!dataset} is not a folder"
  mkdir -p "$work"
  echo '*' > "$work/.gitignore"
  if [[ ! -d $work/raw ]]; then
    raw=$work/raw.part
    rm -rf "$raw"
    mkdir "$raw"
    for split in train valid test; do
      text $split
    done
    mv "$raw" "$work/raw"
  fi

  step "fairseq-preprocess"
  if [[ ! -d $work/bin ]]; then
    rm -rf "$bin"
    mkdir "$bin"
    cat "$work"/raw/train.input* > "$bin/text"  # both sentences of a pair have one dictionary
    log "$work/preprocess.log" fairseq-preprocess --only-source --dict-only --trainpref "$bin/text" \
      --thresholdsrc "$min_count" --destdir "$bin"
    for name in input0 input1 label; do
      [[ -e $work/raw/train.$name ]] || continue
      dictionary=(--srcdict "$bin/dict.txt")
      [[ $name != label ]] || dictionary=()
      log "$work/preprocess.log" fairseq-preprocess --only-source "${dictionary[@]}" --destdir "$bin/$name" \
        --trainpref "$work/raw/train.$name" --validpref "$work/raw/valid.$name" --testpref "$work/raw/test.$name"
    done
    rm "$bin/text"
    mv "$bin" "$work/bin"
  fi
}

train() {  # train CELL
  log "$work/$1/train.log" fairseq-train "$work/bin" --user-dir "$user_dir" \
    --task sentence_prediction --num-classes "$(sort -u "$work/raw/train.label" | wc -l)" \
    --criterion sentence_prediction --cell "$1" "${options[@]}" \
    --required-batch-size-multiple 1 --max-epoch "$max_epoch" --seed 1 \
    --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints \
    --save-dir "$work/$1" --num-workers 0 --log-format simple --log-interval 20 "${extra[@]}"
}

accuracy() {  # accuracy FOLDER SPLIT
  grep "valid on '$2' subset | loss" "$1/evaluation.log" | tail -n 1 | grep -o 'accuracy [0-9.]*' | cut -d ' ' -f 2
}

evaluate() {  # evaluate CELL: its row of the table
  local folder=$work/$1 valid test
  step "evaluating $1"
  if [[ ! $folder/evaluated -nt $folder/checkpoint_best.pt ]]; then
    log "$folder/evaluation.log" fairseq-validate "$work/bin" --user-dir "$user_dir" \
      --task sentence_prediction --criterion sentence_prediction --path "$folder/checkpoint_best.pt" \
      --valid-subset valid,test --batch-size 64 --required-batch-size-multiple 1 --num-workers 0 --log-format simple
    touch "$folder/evaluated"
  fi
  valid=$(accuracy "$folder" valid)
  test=$(accuracy "$folder" test)
  echo "| $1 | $(parameters "$folder/train.log") | $valid | $test | $(awk "BEGIN { printf \"%.1f\", 100 - $test }")" \
    "| $(seconds_per_update "$folder/train.log") |"
}

recipe() {  # recipe [CELL ...] [-- option ...]: all steps, each unless its result is there already, and a table
  local cell
  choose "$@"
  prepare
  for cell in "${cells[@]}"; do
    step "training $cell"
    once "$work/$cell" "MAX_EPOCH=$max_epoch ${extra[*]}" train "$cell"
  done
  echo "| unit | parameters | validation accuracy | test accuracy | test error % | training s a batch |"
  echo "|---|---|---|---|---|---|"
  for cell in "${cells[@]}"; do
    evaluate "$cell"
  done
}
