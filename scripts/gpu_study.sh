#!/usr/bin/env bash
# Trains Muon and NorMuon on every step and two presets on one GPU, four replicas in one process, and prints
# their losses. Needs a text of some 100 MB, a file or a folder of UTF-8; no network but for installing.
#     scripts/gpu_study.sh TEXT                   # 25M parameters, 600 steps, three seeds
#     scripts/gpu_study.sh TEXT --size 151m       # one seed; each about 20 minutes on an H100 (projected)
#     scripts/gpu_study.sh TEXT --no-install      # with the environment that is active
# Other arguments go to benchmarks/convergence.py. Lines go to benchmarks/results/convergence_gpu.jsonl, or to
# the folder in $RESULTS; a run that is there already is not run again, so a second call goes on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh"
end_with_help "$@"
if (($# == 0)); then print_help >&2 && exit 2; fi
text="$1"
shift
size=25m
install=1
arguments=()
while (($#)); do
  case "$1" in
    --size) size="${2:?--size needs 25m or 151m}" && shift ;;
    --no-install) install=0 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
case "$size" in
  25m) model=(--dim 512 --layers 8 --heads 8 --seq 256 --batch 16 --seeds 0 1 2) ;;
  151m) model=(--dim 1024 --layers 12 --heads 16 --seq 512 --batch 16 --seeds 0) ;;
  *) echo "--size must be 25m or 151m; got $size" >&2 && exit 2 ;;
esac
if ((install)); then
  ensure_venv "kernels,report"
fi
exec python "$root/benchmarks/convergence.py" --device cuda --tables gpu --replicas 4 --steps 600 \
  "${model[@]}" \
  --text "$text" --out "${RESULTS:-$root/benchmarks/results}/convergence_gpu.jsonl" \
  ${arguments[@]+"${arguments[@]}"}
