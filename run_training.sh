#!/usr/bin/env bash
# Train: ./run_training.sh [CONFIG] [--section.key value …]
# Makes the environment, prepares the corpus, trains (or continues), and says what to do next. --help lists the keys.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/harness/environment.sh"
use_environment "$root/requirements.txt"

here=$PWD
if [[ $# -eq 0 || $1 == --* && $1 != --help ]]; then
  set -- "$root/configs/stdlib_softmax1.yaml" "$@"
elif [[ -e $1 ]]; then # relative to where the user stands
  set -- "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")" "${@:2}"
fi
cd "$root" # the paths in configs are relative to the repository, those on the command line to where the user stands
exec python -m harness.launch "$here" "$@"
