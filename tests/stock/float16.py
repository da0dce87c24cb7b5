"""Checks bundles of 16-bit precisions with tools that are not ours: the ONNX checker accepts every graph, all types
inferred, and stock onnxruntime loads those that it has kernels for, which bf16 are not.

Usage: float16.py BUNDLE [BUNDLE...]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime


def check_bundle(folder):
    manifest = json.loads((folder / "bundle.json").read_text())
    rounding = manifest["quantization"]["rounding"]
    runs = rounding["format"] == "f16" or rounding["emulated"] or manifest["target"] == "ort-cpu"
    # The checker refuses weights that are hard links: it is given a copy.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        for path in sorted(Path(copy).glob("*.onnx")):
            onnx.checker.check_model(str(path), full_check=True)
            if runs:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            print(f"{folder.name}/{path.name}: ok{'' if runs else ', not loaded'}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check_bundle(Path(argument))
