# What the translation recipes share, to be sourced by one that sets
#   dataset                                name of the variable that may hold a folder with the text
#   src, tgt                               languages
#   work, max_update, vocab_size, average  see README.md
#   clean                                  bpe.py's limits of training pairs, MAX_LENGTH and MAX_RATIO, or nothing
#   search                                 options of fairseq-generate
# and defines
#   fetch                                  put the text into $work/download: see download
#   original SPLIT LANGUAGE                print the text of train, valid or test: see text
#   train FOLDER ARCH [option ...]         see fairseq_train
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

run=${RUN:-${1:-}}  # folder of this training run, in $work
name=best           # of the checkpoint that translates
[[ $average == 0 ]] || name=average$average

download() {  # download URL [option of tar ...]: an archive is unpacked
  local file=$work/download/${1##*/}
  [[ ! -e $file ]] || return 0
  mkdir -p "$work/download"
  curl -fsSL --retry 3 --continue-at - -o "$file.part" "$1"
  [[ $file != *.tgz ]] || tar -xzf "$file.part" -C "$work/download" "${@:2}"
  mv "$file.part" "$file"
}

text() {  # text NAME: print a file of the dataset
  local folder=${!dataset:-$work/download}
  local file=$folder/$1
  [[ -e $file ]] || file+=.gz
  [[ -e $file ]] || die "neither $1 nor $1.gz in ${!dataset:+$dataset=}$folder"
  gzip -dcf "$file"  # -f: what is not compressed passes as it is
}

prepare() {
  local split lang file fetched=
  step "raw text"
  [[ -z ${!dataset:-} || -d ${!dataset} ]] || die "$dataset=${!dataset} is not a folder"
  mkdir -p "$work/raw"
  echo '*' > "$work/.gitignore"
  for split in train valid test; do
    for lang in "$src" "$tgt"; do
      file=$work/raw/$split.$lang
      if [[ ! -e $file ]]; then
        if [[ -z ${!dataset:-}$fetched ]]; then
          fetch
          fetched=yes
        fi
        original "$split" "$lang" > "$file.part"
        mv "$file.part" "$file"
      fi
    done
  done
  rm -rf "$work/download"

  step "sentencepiece"
  if [[ ! -d $work/bpe ]]; then
    python "$examples/translation/bpe.py" "$work/raw" "$work/bpe.part" "$vocab_size" $clean
    mv "$work/bpe.part" "$work/bpe"
  fi

  step "fairseq-preprocess"
  if [[ ! -d $work/bin ]]; then
    rm -rf "$work/bin.part"  # fairseq-preprocess overwrites no dictionary
    fairseq-preprocess -s "$src" -t "$tgt" --trainpref "$work/bpe/train" --validpref "$work/bpe/valid" \
      --testpref "$work/bpe/test" --joined-dictionary --workers "$(getconf _NPROCESSORS_ONLN)" \
      --destdir "$work/bin.part"
    mv "$work/bin.part" "$work/bin"
  fi
}

fairseq_train() {  # fairseq_train FOLDER option ...
  fairseq-train "$work/bin" --user-dir "$user_dir" --task translation -s "$src" -t "$tgt" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 \
    --max-tokens 4096 --required-batch-size-multiple 1 --max-update "$max_update" --seed 1 \
    --save-dir "$1" --keep-last-epochs 10 --num-workers 0 --log-format simple --log-interval 20 "${@:2}"
}

translate() {  # translate CHECKPOINT OUTPUT; fairseq's messages go to OUTPUT.log
  fairseq-generate "$work/bin" --user-dir "$user_dir" --task translation -s "$src" -t "$tgt" --path "$1" \
    "${search[@]}" --remove-bpe sentencepiece --batch-size 128 --required-batch-size-multiple 1 \
    > "$2" 2> "$2.log" || { tail -n 20 "$2.log" >&2; die "fairseq-generate failed, see $2.log"; }
}

log_train() { train "$@" | tee -a "$1/train.log"; }

recipe() {  # recipe ARCH [option ...]: all steps, each unless its result is there already
  local folder=$work/$run sources translations
  prepare

  step "training $run"
  once "$folder" "MAX_UPDATE=$max_update $*" log_train "$folder" "$@"

  if [[ $average != 0 ]]; then
    step "averaging $average checkpoints"
    [[ $folder/checkpoint_$name.pt -nt $folder/checkpoint_last.pt ]] ||
      PYTHONPATH=$(dirname "$user_dir")${PYTHONPATH:+:$PYTHONPATH} \
        python "$examples/translation/average.py" "$folder" "$average" "$folder/checkpoint_$name.pt"
  fi

  step "translating"
  if [[ ! $folder/$name.$tgt -nt $folder/checkpoint_$name.pt ]]; then
    translate "$folder/checkpoint_$name.pt" "$folder/$name.generate"
    grep '^D-' "$folder/$name.generate" | cut -c 3- | sort -n | cut -f 3- > "$folder/$name.$tgt"
  fi

  step "scoring"
  sources=$(awk 'END { print NR }' "$work/raw/test.$src")
  translations=$(awk 'END { print NR }' "$folder/$name.$tgt")
  [[ $sources -eq $translations ]] || die "$translations translations of $sources sentences"
  sacrebleu "$work/raw/test.$tgt" -i "$folder/$name.$tgt" -m bleu chrf -f text -w 1
}

published_recipe() {  # published_recipe ARCH [option ...]: recipe, and the score that papers give
  local folder=$work/$run
  [[ -n ${1:-} ]] || die "usage: bash $(basename "$0") ARCH [fairseq-train option ...]"
  command -v sacremoses > /dev/null || die "no command sacremoses: pip install sacremoses"
  recipe "$@"

  step "scoring as published: tokenized, case-insensitive"
  sacremoses -l "$tgt" tokenize < "$work/raw/test.$tgt" > "$folder/reference.tok.$tgt"
  sacremoses -l "$tgt" tokenize < "$folder/$name.$tgt" > "$folder/$name.tok.$tgt"
  sacrebleu "$folder/reference.tok.$tgt" -i "$folder/$name.tok.$tgt" -lc --tokenize none --force -f text -w 1
}
