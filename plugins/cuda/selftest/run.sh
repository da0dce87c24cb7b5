#!/bin/sh
# Tries kernels, operators and methods on this machine's GPU, and the tiny bundles against their expected values. README.txt beside
# this file says what it needs. Ends with 0 if all results are as expected, 1 if one is not, 2 if it could not try.
cd "$(dirname "$0")" || exit 2

library=$(ls onnxruntime/libonnxruntime.so.* 2>/dev/null | head -n 1)
if [ -n "$library" ]; then
  ORT_DYLIB_PATH=$PWD/$library
  LD_LIBRARY_PATH=$PWD/onnxruntime${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export ORT_DYLIB_PATH LD_LIBRARY_PATH
fi

./accordion selftest gpu --kernels kernels --output result.json "$@"
worst=$?
[ "$worst" -ge 2 ] && exit "$worst"

if [ -z "$ORT_DYLIB_PATH" ]; then
  echo "Bundles were not tried: join.sh puts ONNX Runtime with CUDA here, or set ORT_DYLIB_PATH"
  exit "$worst"
fi
for bundle in bundles/*; do
  name=$(basename "$bundle")
  ./accordion verify "$bundle" --against "expected/$name.safetensors" --taps result --engine ort-cuda --quiet \
    --out "verify-$name.json"
  code=$?
  echo "$name against its expected values: exit code $code"
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
