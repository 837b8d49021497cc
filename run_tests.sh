#!/usr/bin/env bash
# Environment, lint, types, tests: ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# The pages of experiments are tested in Debian's Chromium. Root on a Debian without it, as in CI, gets it here, beside
# the environment; anyone else without it sees that test skipped.
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null && ! command -v chromedriver >/dev/null; then
  echo "installing chromium and chromium-driver, for the tests of pages"
  (apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 &
fi
source harness/environment.sh
use_environment requirements-dev.txt

wait # for Chromium
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
