#!/usr/bin/env bash
# Measures the kernels and whole steps on this machine's GPU and shows the results, in under nine minutes; no
# network but for installing. Results are appended to benchmarks/results/, or to the folder in $RESULTS.
#     scripts/gpu_benchmarks.sh
#     scripts/gpu_benchmarks.sh --no-install      # with the active environment; its torch must have triton
#     scripts/gpu_benchmarks.sh --compile         # also torch.compile's variants, which take minutes
#     scripts/gpu_benchmarks.sh --commit abc123   # what to note as the commit, where there is no git
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh"
end_with_help "$@"
results="${RESULTS:-$root/benchmarks/results}"
install=1
compile=(--no-compile)
common=()
while (($#)); do
  case "$1" in
    --no-install) install=0 ;;
    --compile) compile=() ;;
    --commit) common+=(--commit "${2:?--commit needs a value}") && shift ;;
    *) echo "unknown argument $1; see $0 --help" >&2 && exit 2 ;;
  esac
  shift
done

if ((install)); then
  ensure_venv "kernels,report"
  python=python
else
  export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
  python="$(command -v python || command -v python3)"
  if ! "$python" -c 'import curvadion, curvadion_kernels.triton_ops'; then
    echo "$python must be able to import torch and triton; it cannot; activate another environment, or" \
      "leave out --no-install." >&2
    exit 1
  fi
fi

mkdir -p "$results"
failed=0
# What was measured is written when the time is up, so a failure of one part does not lose the others.
timeout --signal=TERM --kill-after=20 250 "$python" "$root/benchmarks/kernels.py" --device cuda \
  --seconds 215 --out "$results/kernels.jsonl" ${compile[@]+"${compile[@]}"} \
  ${common[@]+"${common[@]}"} || failed=1
timeout --signal=TERM --kill-after=20 265 "$python" "$root/benchmarks/step.py" --device cuda \
  --seconds 230 --out "$results/step.jsonl" ${common[@]+"${common[@]}"} || failed=1
files=()
for file in "$results/kernels.jsonl" "$results/step.jsonl"; do
  if [[ -s "$file" ]]; then files+=("$file"); fi
done
if ! "$python" -c 'import rich, matplotlib' 2>/dev/null; then
  echo "No table or picture: rich and matplotlib are missing. Elsewhere:"
  echo "    python benchmarks/report.py ${files[*]}"
elif ((${#files[@]})); then
  "$python" "$root/benchmarks/report.py" "${files[@]}" --picture "$results/gpu.png" || failed=1
fi
exit "$failed"
