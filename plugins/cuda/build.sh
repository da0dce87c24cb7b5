#!/usr/bin/env bash
# Compiles the kernels of every operator for every GPU generation that is shipped, into a folder (target/kernels):
#
#   topk_prune.sm_90.cubin ...    what `accordion selftest gpu --kernels` loads
#   topk_prune.compute_80.ptx     the same for GPUs of generations to come, which their driver compiles
#   report.txt                    registers, stack and spills of every kernel
#
# Fails on a warning, and on a kernel that spills registers or needs a stack. NVCC names another compiler than the one of toolkit.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-target/kernels}
nvcc=${NVCC:-$(plugins/cuda/toolkit.sh)/bin/nvcc}
architectures="80 89 90 100"

mkdir -p "$(dirname "$out")"
aside=$(mktemp -d "$(dirname "$out")/.kernels-XXXXXX")
trap 'rm -rf "$aside"' EXIT

for kernel in topk_prune strided_compress append_rows; do
  for architecture in $architectures; do
    "$nvcc" -std=c++17 -O3 -arch="sm_$architecture" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v,-warn-spills \
      -I plugins/cuda -I "plugins/$kernel" -cubin -o "$aside/$kernel.sm_$architecture.cubin" "plugins/$kernel/kernel.cu" \
      2>>"$aside/report.txt" || { cat "$aside/report.txt" >&2; exit 1; }
  done
  "$nvcc" -std=c++17 -O3 -arch=compute_80 -Werror all-warnings -I plugins/cuda -I "plugins/$kernel" -ptx \
    -o "$aside/$kernel.compute_80.ptx" "plugins/$kernel/kernel.cu"
done

# The compiler names a kernel, then says what it takes.
awk '
  /Compiling entry function/ { kernel = $0; sub(/.*Compiling entry function /, "", kernel); gsub("\x27", "", kernel); kernels++ }
  /bytes stack frame/ { if ($1 + $5 + $9 > 0) { print kernel ": " $0; failed = 1 } measured++ }
  END {
    if (kernels == 0 || kernels != measured) { print "the compiler reported " measured + 0 " of " kernels + 0 " kernels"; failed = 1 }
    exit failed
  }
' "$aside/report.txt" >&2 || { echo "a kernel spills registers, or the report is incomplete" >&2; exit 1; }

# The launching functions, as a host that is compiled by nvcc takes them.
for kernel in topk_prune strided_compress append_rows; do
  "$nvcc" -std=c++17 -arch=sm_90 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror,-fPIC -I plugins/cuda -I "plugins/$kernel" \
    -c -o "$aside/$kernel.o" "plugins/$kernel/kernel.cu"
  rm "$aside/$kernel.o"
done

chmod 755 "$aside"
rm -rf "$out"
mv "$aside" "$out"
echo "$out: $(grep -c 'Compiling entry function' "$out/report.txt") kernels, none spills"
