# Sourced by run_training.sh and run_tests.sh.

# use_environment REQUIREMENTS: put a Python with these requirements on the PATH. That is the environment already
# active, or else .venv beside this folder, made if need be. Installs only when the requirements have changed since.
use_environment() {
  local requirements=$1 here=${BASH_SOURCE[0]%/*}/.. environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} python
  if [[ -z $environment ]]; then
    environment=$(cd "$here" && pwd)/.venv
    if [[ ! -x $environment/bin/python ]]; then
      python=$(find_python) || exit 2
      echo "making $environment with $("$python" --version)"
      rm -rf "$environment"
      "$python" -m venv "$environment"
    fi
    export VIRTUAL_ENV=$environment PATH="$environment/bin:$PATH"
  elif ! is_recent "$environment/bin/python"; then
    echo "error: the active environment, $environment, has no Python 3.11 or later: deactivate it, or activate another" >&2
    exit 2
  fi

  local installed=$environment/.offbyone-$(basename "$requirements") wanted
  wanted=$(cd "$(dirname "$requirements")" && cat requirements.txt "$(basename "$requirements")")
  if [[ $(cat "$installed" 2>/dev/null) != "$wanted" ]]; then
    echo "installing $requirements into $environment (a few minutes the first time)"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    echo "$wanted" >"$installed"
  fi
}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_recent "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or later found: install one (https://www.python.org/downloads/) and run this again" >&2
  return 1
}

is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
