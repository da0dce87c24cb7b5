#!/bin/sh
# Puts ONNX Runtime together out of its parts: ./join.sh [FOLDER OF THE PARTS, or this one]. Every part and the whole are checked
# against the hashes in provider.sha256; nothing is left where one is wrong or missing.
cd "$(dirname "$0")" || exit 2
folder=${1:-.}
whole=onnxruntime.tar.gz

fail() {
  rm -rf ".$whole" .onnxruntime
  echo "$1" >&2
  exit 2
}

[ -f provider.sha256 ] || fail "provider.sha256 is not here: this folder was assembled without ONNX Runtime"
: > ".$whole" || exit 2
while read -r expected name; do
  [ "$name" = "$whole" ] && continue
  [ -f "$folder/$name" ] || fail "$folder/$name is missing"
  found=$(sha256sum < "$folder/$name" | cut -d' ' -f1)
  [ "$found" = "$expected" ] || fail "$folder/$name: SHA-256 is $found, expected $expected"
  cat "$folder/$name" >> ".$whole" || fail "$folder/$name could not be read, or there is no room"
done < provider.sha256
expected=$(grep " $whole\$" provider.sha256 | cut -d' ' -f1)
found=$(sha256sum < ".$whole" | cut -d' ' -f1)
[ "$found" = "$expected" ] || fail "the whole: SHA-256 is $found, expected $expected"
mkdir .onnxruntime && tar -xzf ".$whole" -C .onnxruntime || fail "the whole could not be unpacked"
rm -rf onnxruntime ".$whole"
mv .onnxruntime onnxruntime
echo "onnxruntime: $(ls onnxruntime | wc -l) files"
