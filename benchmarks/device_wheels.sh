#!/usr/bin/env bash
# The wheels that an image with jax and torch lacks, for `benchmarks/device.sh OUT FOLDER`: pure Python, few megabytes.
#
#     benchmarks/device_wheels.sh FOLDER
set -euo pipefail
python="${PYTHON:-python3}"
mkdir -p "$1"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$1" \
  ml_collections absl-py chex gguf toolz contextlib2
du -sh "$1"
