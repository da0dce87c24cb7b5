"""Checks bundles with tools that are not ours: the ONNX checker accepts every graph, and stock onnxruntime loads and
runs them, without any kernel of ours.

Usage: check.py BUNDLE [BUNDLE...]; the bundles are of one checkpoint, and must compute the same.
"""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def dimension(name, sizes):
    """A dimension: a product of numbers and symbols, each with the size the caller gives it."""
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in name.split(" * "))


def declared(signature, names, sizes):
    """The shapes that the graph itself declares for some of its outputs."""
    shapes = {o["name"]: o["shape"] for o in signature["outputs"]}
    return {name: [dimension(d, sizes) for d in shapes[name]] for name in names}


def run(sess, signature, sizes, values):
    """Runs a graph on `values`, and on seeded noise for the inputs that are not among them."""
    noise = np.random.default_rng(0)
    feeds = {}
    for info in signature["inputs"]:
        shape = [dimension(d, sizes) for d in info["shape"]]
        if info["name"] in values:
            feeds[info["name"]] = np.asarray(values[info["name"]], dtype=np.int64).reshape(shape)
        elif info["dtype"] == "f32":
            feeds[info["name"]] = noise.standard_normal(shape).astype(np.float32)
        else:
            raise SystemExit(f"do not know what to feed to input {info['name']}")
    names = [o["name"] for o in signature["outputs"]]
    return dict(zip(names, sess.run(names, feeds)))


def check_values(path, outputs, expected):
    for name, shape in expected.items():
        if outputs[name].shape != tuple(shape):
            raise SystemExit(f"{path}: output {name} has shape {outputs[name].shape}, expected {tuple(shape)}")
    for name, value in outputs.items():
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise SystemExit(f"{path}: output {name} is not finite")


def check_models(folder):
    """The checker refuses weights that are hard links, as a bundle's usually are: it is given a copy."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        for path in Path(copy).glob("*.onnx"):
            onnx.checker.check_model(str(path), full_check=True)


def check_bundle(folder):
    """Runs every graph of a bundle and returns what does not depend on the target: the decoder's logits for three fixed
    tokens, RCC's maps of two segments and the last layer's keys of three slots."""
    manifest = json.loads((folder / "bundle.json").read_text())
    hidden = manifest["architecture"]["hidden_size"]
    comparable = {}
    check_models(folder)
    for name, entry in manifest["graphs"].items():
        path = folder / entry["file"]
        signature, sess = entry["signature"], session(path)
        if name == "decoder":
            capacity = {"past": 0, "capacity": 8}
            values = {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2], "num_logits_to_keep": [3], "past_length": [0]}
            outputs = run(sess, signature, {"batch": 1, "sequence": 3, **capacity}, values)
            comparable["logits"] = outputs["logits"]
            outputs = {"logits": outputs["logits"]}
            expected = {"logits": (1, 3, manifest["architecture"]["vocab_size"])}
        elif name == "head":
            outputs = run(sess, signature, {"batch": 2, "sequence": 3}, {})
            expected = {"logits": (2, 3, manifest["architecture"]["vocab_size"])}
        elif name == "encoder":
            sizes = {"segments": 2}
            window = dimension(signature["inputs"][0]["shape"][1], sizes)
            outputs = run(sess, signature, sizes, {"input_ids": [i % 97 for i in range(2 * window)]})
            expected = declared(signature, ["maps"], sizes)
            comparable["maps"] = outputs["maps"]
        elif name == "slots":
            sizes = {"batch": 1, "slots": 3, "past": 0, "capacity": 8}
            outputs = run(sess, signature, sizes, {"position_ids": [0, 1, 2], "past_length": [0]})
            expected = declared(signature, ["last.key", "last.value"], sizes)
            outputs = {name: outputs[name] for name in expected}
            comparable["slots"] = outputs["last.key"]
        elif name.startswith("leaf"):
            values = {"input_ids": [range(9), range(9)], "position_ids": [range(9), range(9)], **AFFIXES, "keep": [6]}
            outputs = run(sess, signature, {"batch": 2, "length": 9, "distances": 16}, values)
            expected = {"hidden": (2, 6, hidden), "kept_position_ids": (2, 6), "keep_idx": (2, 6)}
            check_selection(path, outputs["keep_idx"], 9)
        elif name.startswith("merge"):
            sides = {f"{side}.position_ids": [0, 1, 4, 8, 9] for side in ("left", "right")}
            outputs = run(sess, signature, {"batch": 1, "left": 5, "right": 5, "distances": 16}, {**sides, **AFFIXES, "keep": [6]})
            rows = 6 if "keep_idx" in outputs else 7
            expected = {"hidden": (1, rows, hidden), "kept_position_ids": (1, rows)}
            if "keep_idx" in outputs:
                check_selection(path, outputs["keep_idx"], 7)
        else:
            raise SystemExit(f"{path}: unknown graph")
        check_values(path, outputs, expected)
        print(f"{path}: ok")
    return comparable


AFFIXES = {"prefix_length": [1], "suffix_length": [2]}


def check_selection(path, keep, length):
    """Survivors are in order, and the affixes are among them."""
    for row in keep:
        ordered = (np.diff(row) > 0).all()
        if not ordered or not {0, length - 2, length - 1} <= set(row.tolist()):
            raise SystemExit(f"{path}: keep_idx {row} does not keep the affixes in order")


def main():
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    first, *others = [check_bundle(folder) for folder in folders]
    for folder, other in zip(folders[1:], others):
        for name, value in other.items():
            worst = np.abs(value - first[name]).max()
            if worst > 1e-4:
                raise SystemExit(f"{folder}: {name} differ from those of {folders[0]} by {worst}")
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
