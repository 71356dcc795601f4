# Sourced by the other scripts. `ensure_venv EXTRAS` makes the environment .venv in the project root, installs
# the project there with those extras if pyproject.toml or constraints.txt changed since the last time, and
# activates it. `end_with_help "$@"` answers --help before anything is installed.
#
# The interpreter is $PYTHON, or the first one on the PATH that is new enough. pip's own settings are
# respected: where the default torch is larger than a machine without a GPU needs, add the index of its CPU
# builds to pip's own (PIP_EXTRA_INDEX_URL, pip.conf).

print_help() {  # the comment at the beginning of the script that runs
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

end_with_help() {  # ARGUMENTS...: if one of them is --help or -h
  local argument
  for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then print_help && exit; fi
  done
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "CurvaDion needs Python 3.11 or newer; got ${PYTHON:-none on the PATH}; install one, or set PYTHON" \
    "to its path." >&2
  return 1
}

ensure_venv() {
  local extras="$1" root venv python stamp wanted
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="$root/.venv"
  stamp="$venv/installed-$extras"
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python="$(find_python)" || return
    echo "Making $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
      echo "$python must be able to make a virtual environment, and cannot; install its venv package" \
        "(python3-venv), or set PYTHON." >&2
      return 1
    fi
  fi
  wanted="$root"$'\n'"$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt")"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    echo "Installing CurvaDion[$extras] into $venv; the first time torch comes along, which is large"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
      --constraint "$root/scripts/constraints.txt" --editable "$root[$extras]"; then
      echo "pip could not install CurvaDion[$extras]; the lines above say why (no network, no torch for" \
        "this Python?)." >&2
      return 1
    fi
    printf '%s\n' "$wanted" >"$stamp"
  fi
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}
