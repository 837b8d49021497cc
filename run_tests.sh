#!/usr/bin/env bash
# Environment, lint, types, tests: ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source harness/environment.sh
use_environment requirements-dev.txt

ruff check .
ruff format --check .
found=$(mktemp)
mypy >"$found" 2>&1 & # beside the tests, which do not need it: half a minute the first time
types=$! status=0
export OMP_NUM_THREADS=1 # a worker a core: more threads would wait for each other
python -m pytest -n auto --dist worksteal "$@" || status=$?
wait $types || status=$?
echo "mypy: $(cat "$found")"
rm "$found"
exit $status
