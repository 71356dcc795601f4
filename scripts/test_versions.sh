#!/usr/bin/env bash
# A subset of the tests on other versions of torch, the oldest and the newest by default, each in a temporary
# environment; builds for CUDA run on a CPU too. Takes minutes and gigabytes a version:
#     scripts/test_versions.sh
#     scripts/test_versions.sh 2.12.1 2.14.1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

subset=(tests/test_{equations,mesh_parity,communication,lifecycle,loading,outer,owners,kernels,compiled,options}.py)
python="$(find_python)"
failed=()
versions=("$@")
((${#versions[@]})) || versions=(2.11.0 2.15.0)
for torch in "${versions[@]}"; do
  folder="$(mktemp -d)"
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$torch" \
    --editable ".[kernels,report]" pytest pytest-xdist numpy setuptools wheel
  echo "== torch $torch"
  "$folder/bin/python" -m pytest -q -n 2 --dist loadgroup "${subset[@]}" || failed+=("torch $torch")
  rm -rf "$folder"
done
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
