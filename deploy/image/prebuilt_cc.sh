#!/bin/sh
# Stands for the C compiler in the CUDA image: gives out the module that prebuild_triton.py made, to whoever would compile its source.
# Triton calls it as `cc SOURCE.c ... -o RESULT.so ...`.
set -eu
folder=${PREBUILT_FOLDER:-/opt/quire/lib/triton}
source= result=
while [ $# -gt 0 ]; do
  case $1 in
    -o) result=$2; shift ;;
    *.c) source=$1 ;;
  esac
  shift
done
if [ -z "$source" ] || [ -z "$result" ]; then
  echo "prebuilt-cc: this image has no C compiler; only Triton's own module is there, made in advance" >&2
  exit 1
fi
if [ "$(sha256sum "$source" | cut -d ' ' -f 1)" != "$(cat "$folder/driver.sha256")" ]; then
  echo "prebuilt-cc: $source is not the source that $folder/driver.so was made of, and this image has no C compiler; build the image anew" >&2
  exit 1
fi
cp "$folder/driver.so" "$result"
