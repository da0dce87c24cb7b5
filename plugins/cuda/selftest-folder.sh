#!/usr/bin/env bash
# Assembles what a machine with nothing but an NVIDIA driver and CUDA's libraries needs to try kernels, operators and methods: the
# program, compiled kernels and their sources, tiny bundles with expected values. The folder's README.txt says what to run there.
#
#   plugins/cuda/selftest-folder.sh [OPTIONS] [FOLDER]     default: target/accordion-selftest, and beside it the same as .tar.gz
#
#   --provider DIR      ONNX Runtime with its CUDA provider (onnxruntime/capi of the Python package onnxruntime-gpu, as
#                       tests/onnxruntime_cuda/prepare fetches it): in parts beside the folder, onnxruntime.tar.gz.00 and so on
#   --library FILE      another library for the same place, as libcudnn.so.9; may be given several times
#   --part-bytes N      size of a part, at most and by default 60 MiB
#   --headers DIR       NVIDIA's headers: TensorRT's plugin library is compiled and added
#
# The folder and every part have at most 60 MiB. ACCORDION and KERNELS name a program and compiled kernels to take instead of
# building them.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/../.."
limit=$((60 << 20))

absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

folder=target/accordion-selftest provider="" headers="" libraries=() part_bytes=$limit
while [ $# -gt 0 ]; do
  case $1 in
    --provider) provider=$(absolute "${2:?--provider needs a folder}"); shift ;;
    --library) libraries+=("$(absolute "${2:?--library needs a file}")"); shift ;;
    --part-bytes) part_bytes=${2:?--part-bytes needs a number}; shift ;;
    --headers) headers=$(absolute "${2:?--headers needs a folder}"); shift ;;
    -*) echo "$1: unknown option; expected --provider, --library, --part-bytes or --headers" >&2; exit 2 ;;
    *) folder=$(absolute "$1") ;;
  esac
  shift
done
if [ ${#libraries[@]} -gt 0 ] && [ -z "$provider" ]; then
  echo "--library needs --provider" >&2
  exit 2
fi

if ! [[ $part_bytes =~ ^[1-9][0-9]*$ ]] || [ "$part_bytes" -gt $limit ]; then
  echo "--part-bytes $part_bytes: expected 1 to $limit" >&2
  exit 2
fi

program=${ACCORDION:-}
if [ -z "$program" ]; then
  cargo build --release --bin accordion
  program=target/release/accordion
fi
kernels=${KERNELS:-}
if [ -z "$kernels" ]; then
  plugins/cuda/build.sh target/kernels
  kernels=target/kernels
fi

mkdir -p "$(dirname "$folder")"
aside=$(mktemp -d "$(dirname "$folder")/.selftest-XXXXXX")
trap 'rm -rf "$aside"' EXIT
out=$aside/folder parts=$aside/parts
mkdir -p "$out/sources" "$out/bundles" "$out/expected" "$parts" "$aside/models"
cp "$program" "$out/accordion"
strip --strip-all "$out/accordion"
cp -r "$kernels" "$out/kernels"
cp plugins/topk_prune/kernel.cu "$out/sources/topk_prune.cu"
cp plugins/strided_compress/kernel.cu "$out/sources/strided_compress.cu"
cp plugins/append_rows/kernel.cu "$out/sources/append_rows.cu"
cp plugins/cuda/*.h plugins/cuda/*.cuh plugins/strided_compress/shapes.h "$out/sources/"
cp LICENSE-APACHE LICENSE-MIT plugins/cuda/selftest/run.sh plugins/cuda/selftest/join.sh "$out/"

# Tiny bundles of every method over random weights. What is expected of them is what the reference computes, in plain Rust.
accordion=$out/accordion
"$accordion" fetch --quiet --random llama-tiny --out "$aside/models/llama" > "$aside/log"
"$accordion" fetch --quiet --random rcc-pythia-tiny --out "$aside/models/rcc" > "$aside/log"
"$accordion" convert sharedllm --quiet --from "$aside/models/llama" --layers 4 "$aside/models/sharedllm" > "$aside/log"
portable=(--target portable --weights copy --quiet)
"$accordion" export plain "$aside/models/llama" "$out/bundles/plain" "${portable[@]}" > "$aside/log"
"$accordion" export homer "$aside/models/llama" "$out/bundles/homer" "${portable[@]}" --context 2048 --max-chunk-len 256 \
  --layers-warmup 2 > "$aside/log"
"$accordion" export rcc "$aside/models/rcc" "$out/bundles/rcc" "${portable[@]}" --window 256 > "$aside/log"
"$accordion" export sharedllm "$aside/models/sharedllm" "$out/bundles/sharedllm" "${portable[@]}" --chunk-len 256 > "$aside/log"
for bundle in "$out"/bundles/*; do
  "$accordion" verify "$bundle" --record "$out/expected/$(basename "$bundle").safetensors" --side reference --taps result --quiet \
    > "$aside/log"
done

if [ -n "$headers" ]; then
  plugins/cuda/plugin-library.sh "$headers" "$out/libaccordion_plugins.so"
  strip --strip-unneeded "$out/libaccordion_plugins.so"
fi

if [ -n "$provider" ]; then
  mkdir "$aside/onnxruntime"
  for name in "$provider"/libonnxruntime.so.* "$provider/libonnxruntime_providers_shared.so" \
    "$provider/libonnxruntime_providers_cuda.so" ${libraries[@]+"${libraries[@]}"}; do
    if [ ! -f "$name" ]; then
      echo "there is no $name" >&2
      exit 2
    fi
    cp -L "$name" "$aside/onnxruntime/"
  done
  tar -C "$aside/onnxruntime" -czf "$aside/onnxruntime.tar.gz" .
  split --bytes="$part_bytes" --numeric-suffixes --suffix-length=2 "$aside/onnxruntime.tar.gz" "$parts/onnxruntime.tar.gz."
  (cd "$parts" && sha256sum --binary onnxruntime.tar.gz.*; cd "$aside" && sha256sum --binary onnxruntime.tar.gz) |
    sed 's/ \*/ /' > "$out/provider.sha256"
fi

cat > "$out/README.txt" <<README
Accordion's self-test on an NVIDIA GPU

    ./run.sh                     everything: a table, result.json, and verify-METHOD.json of the tiny bundles
    ./run.sh --no-methods        without the methods at the sizes of real models
    ./run.sh --shape smollm2     smaller models; --shape tiny --quick takes seconds
    ./accordion selftest gpu --help

Needed: Linux on x86-64, the NVIDIA driver (580 or later), and for products libcublasLt.so.13 where the linker finds it (LD_LIBRARY_PATH).
No network and no CUDA toolkit. Methods take a few gigabytes in the folder for temporary files (--work-dir).

Operators against unfused ones, methods and bundles also need ONNX Runtime with its CUDA provider, and that needs cuBLAS, cuRAND,
cuFFT and the runtime of CUDA 13, and cuDNN 9. $(
  if [ -n "$provider" ]; then
    echo "It comes in parts, onnxruntime.tar.gz.00 and so on. Put them together first:

    ./join.sh FOLDER_OF_THE_PARTS"
  else
    echo "It is not in this folder: set ORT_DYLIB_PATH to onnxruntime/capi/libonnxruntime.so.1.31.1
of the Python package onnxruntime-gpu."
  fi
)

What could not be tried is listed at the end of the table, with the reason. Exit codes: 0, all results are as expected; 1, one is not;
2, it could not be tried.

accordion            the program
kernels/             the CUDA kernels, compiled for sm_80, sm_89, sm_90, sm_100 and as PTX; sources/ has what they are compiled from
bundles/, expected/  a tiny model of every method with random weights, and what the reference makes of it
$([ -z "$headers" ] || echo "libaccordion_plugins.so   TensorRT's plugins, with the kernels: accordion build --plugins")
README
chmod 755 "$out"

check_size() {
  if [ "$1" -gt $limit ]; then
    echo "$2 has $1 bytes, expected at most $limit" >&2
    exit 1
  fi
}
size=$(du -sb "$out" | cut -f1)
check_size "$size" "the folder"
tar -C "$aside" -czf "$aside/packed.tar.gz" --transform "s,^folder,$(basename "$folder")," folder
rm -rf "$folder" "$folder.parts"
mv "$out" "$folder"
mv "$aside/packed.tar.gz" "$folder.tar.gz"
echo "$folder: $size bytes; $folder.tar.gz: $(stat -c %s "$folder.tar.gz") bytes"
if [ -n "$provider" ]; then
  mv "$parts" "$folder.parts"
  chmod 755 "$folder.parts"
  echo "$folder.parts: $(ls "$folder.parts" | wc -l) parts of ONNX Runtime"
fi
