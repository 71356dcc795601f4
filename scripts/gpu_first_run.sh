#!/usr/bin/env bash
# Checks on this machine's GPU all that a CPU cannot show, then measures a little, in under nine minutes; no
# network but for installing. One page and one JSON in benchmarks/results/gpu_first_run say what holds and
# what does not; ends with 1 if something does not. Takes the environment that is active if that has torch and
# triton, else makes one. Other arguments go to benchmarks/gpu_first_run.py:
#     scripts/gpu_first_run.sh
#     scripts/gpu_first_run.sh --no-install           # with the environment that is active, whatever it has
#     scripts/gpu_first_run.sh --parts kernels,ranks
#     scripts/gpu_first_run.sh --device cpu --quick   # a rehearsal
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh"
end_with_help "$@"
install=1
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --no-install ]]; then install=0; else arguments+=("$argument"); fi
done

python="$(command -v python || command -v python3 || true)"
if ((install)) &&
  ! "$python" -c 'import torch, triton, numpy; assert torch.cuda.is_available()' 2>/dev/null; then
  ensure_venv dev
  python=python
fi
exec "$python" "$root/benchmarks/gpu_first_run.py" ${arguments[@]+"${arguments[@]}"}
