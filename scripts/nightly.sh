#!/usr/bin/env bash
# What takes too long for scripts/test.sh: random runs, faults with real processes, a run that is killed and
# restarted, 3,000 steps in bfloat16. MINUTES says how long to draw random runs; each prints the seed with
# which `python tests/fuzz.py --first SEED --count 1` does it again:
#     MINUTES=60 scripts/nightly.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
ensure_venv dev

export OMP_NUM_THREADS=1
failed=()
check() {  # COMMAND...: go on after a failure, so that one run tells all
  echo "== $*"
  "$@" || failed+=("$*")
}
check python tests/fuzz.py --minutes "${MINUTES:-60}"
check python tests/faults.py --times 3 --strict
check python tests/restarts.py
check python tests/long_bf16.py

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "All passed in $SECONDS s."
