#!/usr/bin/env bash
# Compiles TensorRT's plugin library with the CUDA kernels of every GPU generation that is shipped.
#
#   plugins/cuda/plugin-library.sh HEADERS OUT      HEADERS has NvInfer.h; OUT is libaccordion_plugins.so
#
# Needs nvcc (NVCC, or that of toolkit.sh) and a C++ compiler (CXX). The CUDA runtime is linked in, cuBLASLt is loaded when it is used.
set -euo pipefail
cd "$(dirname "$0")/../.."

headers=$1 out=$2
toolkit=${NVCC:+$(dirname "$(dirname "$NVCC")")}
toolkit=${toolkit:-$(plugins/cuda/toolkit.sh)}
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT

generations=()
for architecture in 80 89 90 100; do
  generations+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
generations+=(-gencode arch=compute_80,code=compute_80)
for kernel in topk_prune strided_compress; do
  "$toolkit/bin/nvcc" -std=c++17 -O3 "${generations[@]}" -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden \
    -I plugins/cuda -I "plugins/$kernel" -c -o "$aside/$kernel.o" "plugins/$kernel/kernel.cu"
done
number=0
for source in plugins/tensorrt/plugins.cpp plugins/*/tensorrt.cpp plugins/strided_compress/cublaslt.cpp; do
  number=$((number + 1))
  "${CXX:-c++}" -std=c++17 -O2 -fPIC -fvisibility=hidden -Wno-deprecated-declarations -isystem "$headers" \
    -I plugins/tensorrt -I plugins/cuda -c -o "$aside/$number.o" "$source"
done
"$toolkit/bin/nvcc" -shared -cudart static -o "$aside/library.so" "$aside"/*.o -ldl
mv "$aside/library.so" "$out"
