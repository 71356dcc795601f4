#!/usr/bin/env bash
# A subset of the tests on other versions of torch, the oldest and the newest by default, each in a temporary
# environment; builds for CUDA run on a CPU too. Takes minutes and 6 gigabytes of /tmp a version, one after
# the other. pip's own settings count; one that caps torch has to be lifted first. Flags go to pytest:
#     scripts/test_versions.sh
#     scripts/test_versions.sh 2.12.1 2.14.1 --each-once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
end_with_help "$@"

subset=(tests/test_{equations,mesh_parity,communication,lifecycle,loading}.py)
subset+=(tests/test_{outer,owners,kernels,compiled,options}.py)
python="$(find_python)"
folder="" failed=() versions=() flags=()
for argument in "$@"; do
  if [[ "$argument" == [0-9]* && ${#flags[@]} -eq 0 ]]; then
    versions+=("$argument")
  else
    flags+=("$argument")
  fi
done
((${#versions[@]})) || versions=(2.11.0 2.15.0)
trap '[[ -z "$folder" ]] || rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1
for torch in "${versions[@]}"; do
  folder="$(mktemp -d)"
  "$python" -m venv "$folder"
  if "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$torch" \
    --editable ".[kernels,report]" pytest pytest-xdist numpy setuptools wheel; then
    "$folder/bin/python" -c 'import torch; print("== torch", torch.__version__)'
    "$folder/bin/python" -m pytest -q -n 2 --dist loadgroup "${subset[@]}" ${flags[@]+"${flags[@]}"} ||
      failed+=("torch $torch")
  else
    failed+=("torch $torch: pip could not install it")
  fi
  rm -rf "$folder"
done
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
