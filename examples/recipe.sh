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

median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

parameters() {  # parameters LOG: of the model that fairseq-train's log tells of
  grep -m 1 -o 'num. shared model params: [0-9,]*' "$1" | cut -d ' ' -f 5
}

seconds_per_update() {  # seconds_per_update LOG: median over the intervals of fairseq-train's log
  grep train_inner "$1" | grep -o 'ups=[0-9.]*' | cut -d = -f 2 | median | awk '{ printf "%.3f\n", 1 / $1 }'
}
