#!/usr/bin/env bash
# Environment, lint, types, tests: ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source harness/environment.sh
use_environment requirements-dev.txt

ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS=1 # a worker a core: more threads would wait for each other
exec python -m pytest -n auto --dist worksteal "$@"
