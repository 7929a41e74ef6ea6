#!/usr/bin/env bash
# CoNLL-2003 named entities with each recurrent unit, from four columns to F1; README.md explains the settings.
#   CONLL2003=DIR bash conll2003.sh [CELL ...] [-- fairseq-train option ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

work=${WORK:-conll2003}              # folder for everything this script writes
max_update=${MAX_UPDATE:-3512}       # 439 are an epoch
choose "$@"

prepare() {
  step "words and tags"
  if [[ ! -d $work/text ]]; then
    [[ -d ${CONLL2003:-} ]] ||
      die "CONLL2003=${CONLL2003:-} must name the folder with eng.train, eng.testa and eng.testb"
    rm -rf "$work/text.part"
    mkdir -p "$work/text.part"
    echo '*' > "$work/.gitignore"
    local names source
    for names in train:eng.train valid:eng.testa test:eng.testb; do
      source=$CONLL2003/${names#*:}
      [[ -e $source ]] || source+=.gz
      [[ -e $source ]] || die "neither ${names#*:} nor ${names#*:}.gz in CONLL2003=$CONLL2003"
      gzip -dcf "$source" |  # -f: what is not compressed passes as it is
        python "$examples/ner/conll.py" /dev/stdin "$work/text.part/${names%:*}"
    done
    mv "$work/text.part" "$work/text"
  fi

  step "fairseq-preprocess"
  if [[ ! -d $work/bin ]]; then
    rm -rf "$work/bin.part"
    log "$work/preprocess.log" fairseq-preprocess -s words -t tags --dataset-impl raw --thresholdsrc 2 \
      --padding-factor 1 --trainpref "$work/text/train" --validpref "$work/text/valid" \
      --testpref "$work/text/test" --destdir "$work/bin.part"
    mv "$work/bin.part" "$work/bin"
  fi
}

common=("$work/bin" --user-dir "$user_dir" --task tagging --required-batch-size-multiple 1 --num-workers 0)

train() {  # train CELL
  fairseq-train "${common[@]}" --arch lrn_tagger --cell "$1" --criterion model \
    --encoder-embed-dim 100 --encoder-hidden-size 100 --char-embed-dim 50 --dropout 0.5 \
    --optimizer adam --lr 0.005 --lr-scheduler polynomial_decay --warmup-updates 100 \
    --total-num-update "$max_update" --max-update "$max_update" --clip-norm 5 --batch-size 32 --seed 1 \
    --best-checkpoint-metric f1 --maximize-best-checkpoint-metric --no-epoch-checkpoints \
    --save-dir "$work/$1" --log-format simple --log-interval 20 "${extra[@]}" | tee -a "$work/$1/train.log" >&2
}

prepare

rows=()
for cell in "${cells[@]}"; do
  folder=$work/$cell
  best=$folder/checkpoint_best.pt
  step "training $cell"
  once "$folder" "MAX_UPDATE=$max_update ${extra[*]}" train "$cell"

  step "tagging with $cell"
  if [[ ! $folder/test.score -nt $folder/trained ]]; then
    rm -f "$folder"/{validate.log,test.generate}
    log "$folder/validate.log" fairseq-validate "${common[@]}" --path "$best" --valid-subset valid,test \
      --batch-size 128
    log "$folder/test.generate" fairseq-generate "${common[@]}" --path "$best" --batch-size 128
    python "$examples/ner/score.py" "$work/text/test.tags" "$folder/test.generate" > "$folder/test.score.part"
    mv "$folder/test.score.part" "$folder/test.score"
  fi

  step "scores of $cell"
  read -r dev_f1 test_f1 <<< "$(grep -o ' f1 [0-9.]*' "$folder/validate.log" | awk '{ printf "%.2f ", $2 }')"
  seqeval=$(tail -n 1 "$folder/test.score")
  [[ $test_f1 == "$seqeval" ]] || die "fairseq-validate counts F1 $test_f1, seqeval of the generated tags $seqeval"
  rows+=("| $cell | $(parameters "$folder/train.log") | $dev_f1 | $test_f1 | $(seconds_per_update "$folder/train.log") |")
done

step "table"
echo "| unit | parameters | dev F1 | test F1 | training s a batch |"
echo "|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
