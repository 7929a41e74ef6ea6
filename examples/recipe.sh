# What the recipes share, to be sourced: steps that name themselves when they fail, and figures from logs.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Keeps the memory of large tensors from one batch to the next; glibc would return it and have it zeroed again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The installed package, else this checkout's; asked from / lest the current folder hide the installed one.
user_dir=$(cd / && python -m fairseq_lrn 2> /dev/null) || user_dir=$(dirname "$examples")/fairseq_lrn

step="arguments"
step() { step=$1; echo "== $step" >&2; }
die() { echo "$*" >&2; exit 1; }
trap '[[ $? -eq 0 ]] || echo "$(basename "$0"): failed in step: $step" >&2' EXIT

log() {  # log FILE COMMAND ...: output to FILE, and its end to the screen where the command fails
  "${@:2}" >> "$1" 2>&1 || { tail -n 20 "$1" >&2; die "$2 failed, see $1"; }
}

choose() {  # choose [CELL ...] [-- fairseq-train option ...]: sets cells, all units without any, and extra
  local all="lrn olrn lstm gru atr sru"
  cells=() extra=()
  while [[ $# -gt 0 && $1 != -- ]]; do
    [[ " $all " == *" $1 "* ]] || die "CELL is $1, but must be lrn, olrn, lstm, gru, atr or sru"
    cells+=("$1")
    shift
  done
  extra=("${@:2}")
  [[ ${#cells[@]} -gt 0 ]] || read -ra cells <<< "$all"
}

once() {  # once FOLDER SETTINGS COMMAND ...: train in FOLDER until it is done, but never go on with other settings
  mkdir -p "$1"
  [[ -e $1/settings ]] || echo "$2" > "$1/settings"
  [[ $(< "$1/settings") == "$2" ]] ||
    die "$1 is of another training, $(< "$1/settings"), and not $2: remove it, or choose another folder"
  if [[ ! -e $1/trained ]]; then
    "${@:3}"
    touch "$1/trained"
  fi
}

median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

parameters() {  # parameters LOG: of the model that fairseq-train's log tells of
  grep -m 1 -o 'num. shared model params: [0-9,]*' "$1" | cut -d ' ' -f 5
}

seconds_per_update() {  # seconds_per_update LOG: median over the intervals of fairseq-train's log
  grep train_inner "$1" | grep -o 'ups=[0-9.]*' | cut -d = -f 2 | median | awk '{ printf "%.3f\n", 1 / $1 }'
}
