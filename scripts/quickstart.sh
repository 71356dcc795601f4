#!/usr/bin/env bash
# From nothing to a trained model: makes an environment, then trains a byte-level GPT in about three minutes
# on two cores, 2 replicas x 2 shards on 4 CPU processes (on a GPU machine: a process for each GPU). Arguments
# go to train.py:
#     scripts/quickstart.sh
#     scripts/quickstart.sh --optimizer dion
#     scripts/quickstart.sh --tau 0.3 --consensus average --local-update gradient --text ~/books
#     scripts/quickstart.sh --help    # this; with train.py's arguments, once the environment is there
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup_env.sh"
if [[ ! -f "$here/../.venv/installed-report" ]]; then end_with_help "$@"; fi
ensure_venv report
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  print_help && echo
  exec python "$here/train.py" --help # once, not from every process
fi

read -r processes threads < <(python -c '
import os, torch
processes = torch.cuda.device_count() or 4
print(processes, max(1, (os.cpu_count() or 1) // processes))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
exec python -m torch.distributed.run --standalone --nproc-per-node "$processes" "$here/train.py" "$@"
