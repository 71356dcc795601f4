#!/usr/bin/env bash
# What takes too long for scripts/test.sh: random runs, faults with real processes, replicas that die at
# random operations, a run that is killed and restarted, all of the cases that scripts/test.sh takes a sample
# of, checkpoints on every mesh, a long run in bfloat16.
set -euo pipefail
help="scripts/nightly.sh [--minutes N]

N is what the whole pass may take on two idle cores, by default 240. Half of it goes to random runs, a quarter
to faults; with fewer faults are tried less often, bfloat16 takes 25 steps for each minute up to 3,000, and
checkpoints are moved between all meshes from 60 minutes on, in all modes from 240 on. 30 is a whole pass of
everything else. A random run prints the seed with which 'python tests/fuzz.py --first SEED --count 1' does
it again."
minutes=240
while (($#)); do
  case "$1" in
    --minutes) minutes="${2:?--minutes needs a number}"; shift 2 ;;
    -h | --help) echo "$help"; exit ;;
    *) echo "$help" >&2; exit 2 ;;
  esac
done
if ! [[ "$minutes" =~ ^[1-9][0-9]*$ ]]; then
  echo "--minutes must be a whole number from 1 on; got $minutes" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
ensure_venv dev

export OMP_NUM_THREADS=1
failed=()
check() {  # COMMAND...: go on after a failure, so that one run tells all
  local began=$SECONDS
  echo "== $*"
  "$@" || failed+=("$*")
  echo "-- $((SECONDS - began)) s"
}
check python tests/fuzz.py --minutes "$((minutes / 2))"
check python tests/faults.py --times 3 --minutes "$((minutes / 4))" --strict
check env ROUNDS="$((minutes / 10 + 1))" SEED="$((SECONDS + $$))" python -m pytest -q tests/nightly_elastic.py
check python tests/restarts.py
check python -m pytest -q -n 2 --dist loadfile --whole tests/test_{faults,mesh_parity,nonfinite,outer,simulation}.py
check python -m pytest -q -n 2 --dist loadfile --whole -m sample
check python -m pytest -q -n 2 --dist loadfile --kernels triton --each-once tests/test_communication.py
check python tests/long_bf16.py --steps "$((minutes < 120 ? minutes * 25 : 3000))"
if ((minutes >= 60)); then
  all=()
  ((minutes < 240)) || all=(--all)
  check python tests/resume_matrix.py "${all[@]}"
fi

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "All passed in $SECONDS s."
