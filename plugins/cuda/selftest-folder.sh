#!/usr/bin/env bash
# Assembles what a machine with nothing but an NVIDIA driver needs to try the kernels: the program, compiled kernels and their sources.
#
#   plugins/cuda/selftest-folder.sh [FOLDER]      default: target/accordion-selftest, and beside it the same as .tar.gz
#   FOLDER/run.sh                                 on the machine with the GPU: a table, and result.json
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=${1:-target/accordion-selftest}
limit=$((60 << 20))

cargo build --release --bin accordion
plugins/cuda/build.sh target/kernels

mkdir -p "$(dirname "$folder")"
aside=$(mktemp -d "$(dirname "$folder")/.selftest-XXXXXX")
trap 'rm -rf "$aside"' EXIT
mkdir "$aside/sources"
cp target/release/accordion "$aside/"
strip --strip-all "$aside/accordion"
cp -r target/kernels "$aside/kernels"
cp plugins/topk_prune/kernel.cu "$aside/sources/topk_prune.cu"
cp plugins/strided_compress/kernel.cu "$aside/sources/strided_compress.cu"
cp plugins/append_rows/kernel.cu "$aside/sources/append_rows.cu"
cp plugins/cuda/*.h plugins/cuda/*.cuh plugins/strided_compress/shapes.h "$aside/sources/"
cp LICENSE-APACHE LICENSE-MIT "$aside/"
cat > "$aside/run.sh" <<'RUN'
#!/bin/sh
# Tries the kernels on this machine's GPU: a table, and the same as result.json. Needs the NVIDIA driver, 580 or later; with
# libcublasLt.so.13 in LD_LIBRARY_PATH it also tries products. Ends with 0 if all results are the CPU's, 1 if not, 2 if it could not try.
cd "$(dirname "$0")" || exit 2
exec ./accordion selftest gpu --kernels kernels --output result.json "$@"
RUN
chmod 755 "$aside" "$aside/run.sh"

size=$(du -sb "$aside" | cut -f1)
if [ "$size" -gt $limit ]; then
  echo "the folder has $size bytes, expected at most $limit" >&2
  exit 1
fi
rm -rf "$folder"
mv "$aside" "$folder"
tar -C "$(dirname "$folder")" -czf "$folder.tar.gz" "$(basename "$folder")"
echo "$folder: $size bytes; $folder.tar.gz: $(stat -c %s "$folder.tar.gz") bytes"
