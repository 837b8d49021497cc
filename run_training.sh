#!/usr/bin/env bash
# Train: ./run_training.sh [CONFIG] [--section.key value …] [--max-restarts N]
# Makes the environment, prepares the corpus, trains (or continues), and says what to do next. --help lists the keys.
# On several GPUs or machines, variables say which, and otherwise SLURM's own in a step of srun: NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE, MAX_RESTARTS, RANK_TIMEOUT. docs/training.md explains them.
set -euo pipefail
trap 'exit 130' INT # bash would forget a Ctrl-C that only it has got
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
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # PyTorch warns of each connection that has no name, or closes
exec python -m harness.launch "$here" "$@"
