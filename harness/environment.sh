# Sourced by run_training.sh and run_tests.sh.

# use_environment REQUIREMENTS: put a Python with these requirements on the PATH. That is the environment already
# active, or else .venv beside this folder, made if need be. Installs only when the requirements have changed since.
use_environment() {
  local requirements=$1 here=${BASH_SOURCE[0]%/*}/.. environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} python
  if [[ -z $environment ]]; then
    environment=$(cd "$here" && pwd)/.venv
    if [[ -x $environment/bin/python ]] && ! is_recent "$environment/bin/python"; then
      echo "error: $environment is of a Python older than 3.11, or of none: remove it, and run this again" >&2
      exit 2
    fi
    if ! has_pip "$environment"; then # not there, or only half made
      python=$(find_python) || exit 2
      echo "making $environment with $("$python" --version)"
      rm -rf "$environment"
      if ! "$python" -m venv "$environment"; then
        rm -rf "$environment"
        echo "error: $python cannot make an environment (see above); on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
      fi
    fi
    export VIRTUAL_ENV=$environment
  elif ! is_recent "$environment/bin/python" || ! has_pip "$environment"; then
    echo "error: the active environment, $environment, needs Python 3.11 or later, and pip: deactivate or mend it" >&2
    exit 2
  fi
  export PATH="$environment/bin:$PATH"
  unset PYTHONDONTWRITEBYTECODE # which would compile PyTorch again at every start

  local installed=$environment/.offbyone-$(basename "$requirements") wanted
  wanted=$(cd "$(dirname "$requirements")" && cat requirements.txt "$(basename "$requirements")")
  if [[ $(cat "$installed" 2>/dev/null) != "$wanted" ]]; then
    echo "installing $requirements into $environment (a few minutes the first time)"
    # Compiling all 16,000 files takes as long as the rest: what is imported is compiled then, and kept.
    if ! python -m pip install --quiet --no-compile --disable-pip-version-check -r "$requirements"; then
      echo "error: pip could not install $requirements (see above)" >&2
      exit 2
    fi
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

has_pip() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1
}
