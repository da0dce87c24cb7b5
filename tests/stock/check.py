"""Checks bundles with tools that are not ours: the ONNX checker accepts every graph, and stock onnxruntime loads and
runs them, without any kernel of ours and with the library of our kernels. Both must compute the same.

Usage: check.py --library LIBRARY BUNDLE [BUNDLE...]; the bundles are of one checkpoint, and must compute the same.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


DOMAIN = "ai.accordion"
# Operators that the library has no kernel for; see their contracts. Their functions run.
WITHOUT_KERNEL = {"StridedCompress", "StridedCompressMean"}
# Largest difference of a value with our kernels and without, for values of the order of one.
TOLERANCE = 1e-4


def session(path, options=None):
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_fused(path, library, names, feeds):
    """Runs a graph with the kernels of the library. All of its nodes that have one must have run as such."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        sess = session(path, options)
        values = sess.run(names, feeds)
        events = json.loads(Path(sess.end_profiling()).read_text())
    ran = {event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"}
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    fused = {node.name for node in nodes if node.domain == DOMAIN and node.op_type not in WITHOUT_KERNEL}
    if not fused <= ran:
        raise SystemExit(f"{path}: no kernel of the library ran for {sorted(fused - ran)}")
    return values, len(fused)


def check_same(path, names, fused, stock):
    for name, ours, theirs in zip(names, fused, stock):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise SystemExit(f"{path}: output {name} is {ours.dtype} {ours.shape} with the library, {theirs.dtype} {theirs.shape} without")
        if not np.allclose(ours, theirs, rtol=0, atol=0 if ours.dtype == np.int64 else TOLERANCE):
            raise SystemExit(f"{path}: output {name} differs by {np.abs(ours - theirs).max()} with the library")


def dimension(name, sizes):
    """A dimension: a product of numbers and symbols, each with the size the caller gives it."""
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in name.split(" * "))


def declared(signature, names, sizes):
    """The shapes that the graph itself declares for some of its outputs."""
    shapes = {o["name"]: o["shape"] for o in signature["outputs"]}
    return {name: [dimension(d, sizes) for d in shapes[name]] for name in names}


def run(path, library, signature, sizes, values):
    """Runs a graph on `values`, and on seeded noise for the inputs that are not among them, without the library
    and with it. Returns what was computed without."""
    feeds = {}
    for info in signature["inputs"]:
        name, shape = info["name"], [dimension(d, sizes) for d in info["shape"]]
        dtype = np.float32 if info["dtype"] == "f32" else np.int64
        if name in values:
            feeds[name] = np.asarray(values[name], dtype=dtype).reshape(shape)
        elif dtype == np.float32:
            feeds[name] = np.random.default_rng(list(name.encode())).standard_normal(shape).astype(dtype)
        else:
            raise SystemExit(f"do not know what to feed to input {name}")
    names = [o["name"] for o in signature["outputs"]]
    stock = session(path).run(names, feeds)
    fused, kernels = run_fused(path, library, names, feeds)
    check_same(path, names, fused, stock)
    print(f"{path}: ok, {kernels} nodes with kernels of the library")
    return dict(zip(names, stock))


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


def check_bundle(folder, library):
    """Runs every graph of a bundle and returns what does not depend on the target: the decoder's logits for three fixed
    tokens, RCC's maps of two segments and the last layer's keys of three slots, the last keys that SharedLLM injects."""
    manifest = json.loads((folder / "bundle.json").read_text())
    hidden = manifest["architecture"]["hidden_size"]
    comparable = {}
    check_models(folder)
    for name, entry in manifest["graphs"].items():
        path = folder / entry["file"]
        signature = entry["signature"]
        if name == "decoder":
            capacity = {"past": 0, "capacity": 8, "injected": 6}
            values = {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2], "num_logits_to_keep": [3], "past_length": [0]}
            outputs = run(path, library, signature, {"batch": 1, "sequence": 3, **capacity}, values)
            comparable["logits"] = outputs["logits"]
            present = {name: rows for name, rows in outputs.items() if name.startswith("present.")}
            outputs = {"logits": outputs["logits"]}
            expected = {"logits": (1, 3, manifest["architecture"]["vocab_size"])}
        elif name == "decoder_step":
            # The last of the decoder's tokens, behind the rows of those before it.
            values = {"input_ids": [7], "position_ids": [2], "past_length": [2]}
            for output, rows in present.items():
                cache = np.zeros((*rows.shape[:2], 8, rows.shape[3]), dtype=rows.dtype)
                cache[:, :, :2] = rows[:, :, :2]
                values[output.replace("present.", "past_key_values.")] = cache
            outputs = run(path, library, signature, {"batch": 1, "capacity": 8, "injected": 6}, values)
            expected = {"logits": (1, 1, manifest["architecture"]["vocab_size"])}
            check_same(path, ["logits"], [outputs["logits"]], [comparable["logits"][:, 2:]])
            for output, rows in present.items():
                check_same(path, [output], [outputs[output.replace("present.", "new.")]], [rows[:, :, 2:]])
        elif name == "head":
            outputs = run(path, library, signature, {"batch": 2, "sequence": 3}, {})
            expected = {"logits": (2, 3, manifest["architecture"]["vocab_size"])}
        elif name == "encoder":
            sizes = {"segments": 2}
            window = dimension(signature["inputs"][0]["shape"][1], sizes)
            outputs = run(path, library, signature, sizes, {"input_ids": [i % 97 for i in range(2 * window)]})
            expected = declared(signature, ["maps"], sizes)
            comparable["maps"] = outputs["maps"]
        elif name == "slots":
            sizes = {"batch": 1, "slots": 3, "past": 0, "capacity": 8}
            outputs = run(path, library, signature, sizes, {"position_ids": [0, 1, 2], "past_length": [0]})
            expected = declared(signature, ["last.key", "last.value"], sizes)
            outputs = {name: outputs[name] for name in expected}
            comparable["slots"] = outputs["last.key"]
        elif name.startswith("compress"):
            sizes = {"batch": 2, "chunks": 3, "running": 5}
            chunk = dimension(signature["inputs"][0]["shape"][2], sizes)
            ids = [i * i % 97 for i in range(2 * 3 * chunk)]
            # The last chunk of the second context ends in padding.
            mask = [i < 6 * chunk - chunk // 3 for i in range(6 * chunk)]
            values = {"context_ids": ids, "context_mask": mask, "first_chunk": [1], "num_chunks": [4]}
            values |= {"running_ids": range(10), "query_index": [3]}
            outputs = run(path, library, signature, sizes, values)
            expected = declared(signature, outputs, sizes)
            last = max(name for name in outputs if name.endswith(".key"))
            comparable[f"{name}: {last}"] = outputs[last]
        elif name.startswith("leaf"):
            values = {"input_ids": [range(9), range(9)], "position_ids": [range(9), range(9)], **AFFIXES, "keep": [6]}
            outputs = run(path, library, signature, {"batch": 2, "length": 9, "distances": 16}, values)
            expected = {"hidden": (2, 6, hidden), "kept_position_ids": (2, 6), "keep_idx": (2, 6)}
            check_selection(path, outputs["keep_idx"], 9)
        elif name.startswith("merge"):
            sides = {f"{side}.position_ids": [0, 1, 4, 8, 9] for side in ("left", "right")}
            outputs = run(path, library, signature, {"batch": 1, "left": 5, "right": 5, "distances": 16}, {**sides, **AFFIXES, "keep": [6]})
            rows = 6 if "keep_idx" in outputs else 7
            expected = {"hidden": (1, rows, hidden), "kept_position_ids": (1, rows)}
            if "keep_idx" in outputs:
                check_selection(path, outputs["keep_idx"], 7)
        else:
            raise SystemExit(f"{path}: unknown graph")
        check_values(path, outputs, expected)
    return comparable


AFFIXES = {"prefix_length": [1], "suffix_length": [2]}


def check_selection(path, keep, length):
    """Survivors are in order, and the affixes are among them."""
    for row in keep:
        ordered = (np.diff(row) > 0).all()
        if not ordered or not {0, length - 2, length - 1} <= set(row.tolist()):
            raise SystemExit(f"{path}: keep_idx {row} does not keep the affixes in order")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("bundles", type=Path, nargs="+")
    arguments = parser.parse_args()
    folders = arguments.bundles
    first, *others = [check_bundle(folder, arguments.library) for folder in folders]
    for folder, other in zip(folders[1:], others):
        for name, value in other.items():
            worst = np.abs(value - first[name]).max()
            if not worst <= TOLERANCE:
                raise SystemExit(f"{folder}: {name} differ from those of {folders[0]} by {worst}")
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
