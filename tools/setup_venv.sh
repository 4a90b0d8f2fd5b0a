#!/usr/bin/env bash
# Make .venv, or bring it up to date, with an editable install of this checkout.
#
#   tools/setup_venv.sh server     what serves: for `make serve` and `make demo`
#   tools/setup_venv.sh dev        that and the tools of `make test`
#
# PYTHON names the Python to use; without it the first of python3.11, python3.12, python3.13, python3 that will do is taken.
# Versions come from deploy/constraints.txt. torch goes first, because where it comes from decides how large it is.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?usage: tools/setup_venv.sh server|dev}
index=https://download.pytorch.org/whl/cpu
python=.venv/bin/python
log=.venv/setup.log

say() { printf '%s\n' "$*"; }

# Whether a Python is new enough and can make environments (Debian ships ensurepip apart, in python3-venv).
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if usable "$name"; then
      say "$name"
      return
    fi
  done
  say "no usable Python: Quire needs 3.11 or newer with the venv module (on Debian and Ubuntu: apt-get install python3 python3-venv)" >&2
  say "tried: ${PYTHON:-python3.11 python3.12 python3.13 python3}; name another one with PYTHON=/path/to/python3 make ..." >&2
  exit 1
}

# Run pip with its output in the log, and show the end of it when it fails.
pip() {
  if ! "$python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; then
    tail -n 30 "$log" >&2
    say "pip failed; everything that it said is in $log" >&2
    return 1
  fi
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# PyTorch's own index has a CPU build, a tenth of the size of the CUDA build that PyPI has for Linux.
cpu_index_answers() {
  timeout 3 "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)' "$index/torch/" >/dev/null 2>&1
}

# Whether pip, left to itself, takes a build with CUDA in it. It looks without downloading.
pip_takes_cuda() {
  "$python" -m pip --disable-pip-version-check install --quiet --dry-run --no-deps --report - "$1" 2>>"$log" |
    "$python" -c 'import json, sys; sys.exit("+cpu" in json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>>"$log"
}

install_torch() {
  local pin
  pin=$(grep '^torch==' deploy/constraints.txt)
  if "$python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' "${pin#torch==}" 2>/dev/null; then
    return
  fi
  if [ "$(uname -s)" = Linux ] && ! has_gpu && cpu_index_answers; then
    say "  $pin, the CPU build, from $index"
    pip install --index-url "$index" "$pin" && return
    say "  that did not work; trying pip's default index"
  fi
  if [ "$(uname -s)" = Linux ] && pip_takes_cuda "$pin"; then
    say "  $pin with CUDA: a download of about 3 GB"
    if ! has_gpu; then
      say "  ($index has a small CPU build, but does not answer from here)"
    fi
  else
    say "  $pin"
  fi
  pip install "$pin"
}

started=$SECONDS
if ! usable "$python"; then
  from=$(find_python)
  rm -rf .venv
  say "setting up .venv with $("$from" --version) (1-3 minutes, most of it downloads)"
  "$from" -m venv .venv
else
  say "updating .venv for the $extra extra"
fi
: >"$log"
install_torch
say "  the $extra extra, versions from deploy/constraints.txt"
pip install --constraint deploy/constraints.txt --editable ".[$extra]"
say ".venv is ready after $((SECONDS - started)) s"
