#!/usr/bin/env bash
# Lint, types and tests, in an environment that this script makes; the optimizer's tests once more, a sample
# of them, on the Triton kernels (all: python -m pytest --kernels triton). Arguments go to pytest:
#     scripts/test.sh
#     scripts/test.sh -k param_groups -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
end_with_help "$@"
ensure_venv dev
# Ranks are forked and on the CPU, and autograd refuses backward in forks of a process that has met a GPU:
# scripts/gpu_first_run.sh is for those.
export CUDA_VISIBLE_DEVICES=

failed=()
check() {  # NAME COMMAND...: go on after a failure, so that one run tells all
  echo "== $1"
  "${@:2}" || failed+=("$1")
}
check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check .
check "mypy" python -m mypy
check "options" python scripts/options.py --check
check "pytest" python -m pytest -n 2 --dist loadfile "$@"
if (($# == 0)); then
  on_kernels=(tests/test_{equations,gate,lifecycle,mesh_parity,nonfinite}.py)
  check "pytest on the Triton kernels" python -m pytest -n 2 --dist loadfile --kernels triton --each-once \
    "${on_kernels[@]}"
fi

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "All checks passed in $SECONDS s."
