#!/usr/bin/env bash
# On a machine with a CUDA card: build, test and measure; README.md says what is measured.
#   bash cuda.sh [STEP ...] [-- benchmark_cuda.py's option ...]      all steps: build test sanitize measure translate
# Needed: fairseq, pytest and hypothesis, and for all rows of the table: pip install sru flash-linear-attention
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

steps=()
while [[ $# -gt 0 && $1 != -- ]]; do steps+=("$1") && shift; done
[[ $# -eq 0 ]] || shift
[[ ${#steps[@]} -gt 0 ]] || steps=(build test sanitize measure translate)
trap '[[ $? -eq 0 ]] || echo "cuda.sh: stopped in step: $step" >&2' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

for step in "${steps[@]}"; do
  echo "== $step" >&2
  case $step in
    build)
      if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        FAIRSEQ_LRN_CUDA=1 python setup.py build_ext --inplace
      else
        echo "there is no CUDA card for this PyTorch: built for the CPU" >&2
        python setup.py build_ext --inplace
      fi
      ;;
    test) python -m pytest -q tests/ops tests/modules tests/models tests/inference tests/csrc ;;
    sanitize)
      if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck; do
          checked=(--kernel-name kns=3lrn4cuda)  # lrn::cuda's kernels alone, as all of PyTorch's take long
          [[ $tool != initcheck ]] || checked=()  # it must see what the others write
          # Without PyTorch's cache every tensor has memory of its own, whose ends can be checked.
          PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${checked[@]}" --error-exitcode 1 \
            python -m pytest -q tests/ops/test_scan.py -k every_kernel
        done
      else
        echo "compute-sanitizer is not on the PATH: left out" >&2
      fi
      ;;
    measure) python examples/efficiency/benchmark_cuda.py "$@" ;;
    translate) python examples/efficiency/decoding_cuda.py ;;
    *) step=arguments; echo "unknown step, want build, test, sanitize, measure or translate" >&2; exit 1 ;;
  esac
done
