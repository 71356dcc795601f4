#!/usr/bin/env bash
# CurvaDion under transformers' Trainer, Accelerate, Lightning and torchao: tests/hosts, and through it the
# examples, with a pinned set of their packages in an environment of their own, .venv-hosts. Meant to take
# under 10 minutes on 2 cores, after the packages have come. Arguments go to pytest:
#     scripts/test_hosts.sh
#     scripts/test_hosts.sh -k lightning -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
end_with_help "$@"

hosts=(transformers==5.24.0 accelerate==1.15.0 lightning==2.6.6 torchao==0.18.0)
venv="$PWD/.venv-hosts"
wanted="$PWD ${hosts[*]} $(cat pyproject.toml scripts/constraints.txt)"
if [[ ! -f "$venv/installed" || "$(cat "$venv/installed")" != "$wanted" ]]; then
  "$(find_python)" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
    --editable '.[kernels]' "${hosts[@]}" pytest numpy
  printf '%s' "$wanted" >"$venv/installed"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q tests/hosts "$@"
echo "Tests of the hosts passed in $SECONDS s."
