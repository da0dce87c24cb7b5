#!/usr/bin/env bash
# Prints the folder of a CUDA 13.0 toolkit, installed into target/ from pinned packages unless it is there: bin/nvcc, include, lib.
set -euo pipefail
cd "$(dirname "$0")/../.."

requirements=plugins/cuda/requirements.txt
folder=target/cuda-toolkit-$(sha256sum "$requirements" | cut -c1-12)
if [ ! -d "$folder" ]; then
  mkdir -p target
  aside=$(mktemp -d target/.cuda-toolkit-XXXXXX)
  trap 'rm -rf "$aside"' EXIT
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --only-binary=:all: \
    --require-hashes --no-compile --target "$aside" -r "$requirements" >&2
  toolkit=$aside/nvidia/cu13
  # Packages carry neither permissions nor the names that programs are linked by.
  chmod +x "$toolkit"/bin/* "$toolkit"/nvvm/bin/*
  ln -s lib "$toolkit/lib64"
  ln -s libcudart.so.13 "$toolkit/lib/libcudart.so"
  ln -s libnvrtc.so.13 "$toolkit/lib/libnvrtc.so"
  mv -T "$aside" "$folder" 2>/dev/null || [ -d "$folder" ]
fi
echo "$PWD/$folder/nvidia/cu13"
