#!/usr/bin/env bash
# Generate the Python stubs of proto/ into src/quire/, where they are committed.
#
#   tools/generate_stubs.sh [DIR]      DIR: where to put them instead of src/ (the test that they are current compares)
#
# Needs the dev extra in the Python named by $PYTHON (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-src}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$(command -v "$python")")
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$out"
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I proto -I "$include" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  $(cd proto && find quire -name '*.proto' | sort)
