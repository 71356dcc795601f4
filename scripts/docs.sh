#!/usr/bin/env bash
# Builds the documentation into runs/site, strictly: a broken link, or a page that the menu lacks, is an
# error. Arguments go to mkdocs:
#     scripts/docs.sh
#     scripts/docs.sh serve     # shows it on http://127.0.0.1:8000 while it is being written
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh"
end_with_help "$@"
ensure_venv docs
cd "$root"
export NO_MKDOCS_2_WARNING=1 # of its maintainers, about a successor
if (($#)); then exec mkdocs "$@"; fi
mkdocs build --quiet
echo "The start page is runs/site/index.html; scripts/docs.sh serve has a search as well"
