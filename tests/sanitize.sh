#!/usr/bin/env bash
# Run the operators' tests with GCC's AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize:
#   bash tests/sanitize.sh [PYTEST'S OPTIONS AND FILES]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$PWD/build/sanitize
mkdir -p "$copy"
rm -rf "$copy/tests" "$copy/fairseq_lrn"
cp -rp fairseq_lrn tests setup.py pyproject.toml "$copy"
cd "$copy"
rm -f fairseq_lrn/_C*.so

# PyTorch's classes have no type information for the check of virtual calls.
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
FAIRSEQ_LRN_CUDA=0 CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=-fsanitize=address,undefined \
  python setup.py -q build_ext --inplace

[[ $# -gt 0 ]] || set -- tests/ops tests/modules tests/csrc
# The interpreter does not free all of its memory at its end.
env PYTHONPATH="$copy" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
  python -m pytest -q "$@"
