"""Static INT8 of one model by accordion and by onnxruntime.quantization, on the same windows of the same text.

Every measured step is a process of its own, so that its peak of resident memory is its own. README.md beside this file
says how to run it and what it does.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

# What the peer is asked for: a name, its calibration method, and whether it rounds the results of products too, as it
# does unless it is told not to.
PEERS = [("minmax", "MinMax", False), ("minmax-outputs", "MinMax", True), ("entropy", "Entropy", False),
         ("percentile", "Percentile", False)]
# As many rows go through the output matrix as accordion's calibration lets through.
LOGIT_ROWS = 32


# --- The peer, in a child ---------------------------------------------------------------------------------------------


class Windows:
    """Windows of tokens, as onnxruntime.quantization reads them: one after the other, from a window to another one."""

    def __init__(self, windows, inputs):
        self.windows, self.inputs = windows, inputs
        self.set_range(0, len(windows))

    def __len__(self):
        return len(self.windows)

    def set_range(self, start_index, end_index):
        self.rest = iter(self.windows[start_index:end_index])

    def get_next(self):
        import numpy as np

        ids = next(self.rest, None)
        if ids is None:
            return None
        feed = {"input_ids": np.array([ids], np.int64), "position_ids": np.arange(len(ids), dtype=np.int64)[None],
                "num_logits_to_keep": np.array([LOGIT_ROWS], np.int64)}
        # Nothing was read before: every cache is empty.
        for name, (heads, width) in self.inputs.items():
            feed[name] = np.zeros((1, heads, 0, width), np.float32)
        return feed


def calibrate(task):
    """The peer's ranges of `task["windows"]`, into the cache file that its quantizer reads."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator, save_tensors_data

    calibrator = create_calibrator(Path(task["model"]), ["Gemm", "MatMul"],
                                   augmented_model_path=str(Path(task["scratch"]) / "augmented.onnx"),
                                   calibrate_method=CalibrationMethod[task["method"]])
    reader = Windows(task["windows"], task["inputs"])
    stride = task["stride"] or len(reader)
    for start in range(0, len(reader), stride):
        reader.set_range(start, start + stride)
        calibrator.collect_data(reader)
    save_tensors_data(calibrator.compute_data(), task["cache"])


def quantize(task):
    """The quantized model of a cache file."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    options = {} if task["outputs"] else {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    # What it recommends for processors with VNNI; the output matrix, which is the embeddings' too, stays as it is.
    quantize_static(task["model"], task["quantized"], None, quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    op_types_to_quantize=["Gemm", "MatMul"], nodes_to_exclude=task["head"],
                    calibrate_method=CalibrationMethod[task["method"]], extra_options=options,
                    calibration_cache_path=task["cache"])


def child(task):
    if task["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (task["limit"], task["limit"]))
    {"calibrate": calibrate, "quantize": quantize}[task["do"]](task)


# --- Measuring --------------------------------------------------------------------------------------------------------


def measured(command, task=None):
    """Runs a command, the task on its standard input: its seconds, its peak of resident bytes, and how it failed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # A task is read whole before anything is written.
    process.stdin.write(json.dumps(task).encode())
    process.stdin.close()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    failed = None
    if status != 0:
        lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        failed = lines[-1] if lines else f"status {status}"
    return {"seconds": seconds, "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024, "failed": failed}


def peer(do, **task):
    return measured([sys.executable, __file__, "--child"], {"do": do, "limit": 0, "stride": 0, **task})


# --- The model and its windows ----------------------------------------------------------------------------------------


def windows_of(table, bundle, text):
    """The tokens of the windows that accordion's table has seen."""
    from tokenizers import Tokenizer

    with open(table, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    said = json.loads(header["__metadata__"]["accordion.ranges"])
    content = Path(text).read_text(encoding="utf-8")
    seen, = said["texts"]
    assert seen["sha256"] == hashlib.sha256(content.encode()).hexdigest(), "the table is of another text"
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    assert not tokenizer.encode("").ids, "the tokenizer puts tokens before a text"
    ids = tokenizer.encode(content, add_special_tokens=False).ids
    return [ids[start:start + said["window_tokens"]] for start in seen["starts"]]


def described(bundle):
    """The graph of a bundle, its caches as heads and width, and the nodes that multiply by the embeddings."""
    import onnx

    path = bundle / "decoder.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    shape = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    inputs = {name: (dims[1], dims[3]) for name, dims in shape.items() if name.startswith("past_key_values.")}
    head = [node.name for node in graph.node if node.op_type == "Gemm" and "embed_tokens" in node.input[1]]
    return {"model": str(path), "inputs": inputs, "head": head}


def as_bundle(out, quantized, name):
    """The peer's model in the place of the decoder of the bundle that it comes from, for accordion to run."""
    made = out / name
    shutil.copytree(out / "portable", made, ignore=shutil.ignore_patterns("model.safetensors"))
    os.link(out / "fp32" / "model.safetensors", made / "model.safetensors")
    os.replace(quantized, made / "decoder.onnx")
    manifest = json.loads((made / "bundle.json").read_text())
    decoder = manifest["graphs"]["decoder"]
    decoder["sha256"] = hashlib.sha256((made / "decoder.onnx").read_bytes()).hexdigest()
    # All its tensors are in the file.
    decoder["signature"]["weights"] = []
    (made / "bundle.json").write_text(json.dumps(manifest))


def row(name, windows, length, run):
    what = run["failed"] or f'{run["seconds"]:7.1f} s {run["processor_seconds"]:7.1f} s of processor'
    print(f'{name:<34} {windows:>3} x {length:<5} {run["peak_bytes"] / 1e9:6.2f} GB {what}', flush=True)
    return {"name": name, "windows": windows, "length": length, **run}


def quality(args, out, bundles):
    """What accordion says of the bundles, on the same windows of the held-out text."""
    command = [args.accordion, "--json", "verify", out / "fp32", "--quality", *(out / name for name in bundles)]
    said = subprocess.run([*command, "--text", args.held_out, "--rounds", "3"], check=True, stdout=subprocess.PIPE)
    report = json.loads(said.stdout)
    for found in report["bundles"]:
        line = f'{Path(found["bundle"]).name:<24} perplexity {found["perplexity"]:9.3f}'
        if found["against"]:
            increase, best = found["against"]["perplexity_increase"], found["against"]["same_best"]
            speed = found["against"]["prefill_speedup"]["median"]
            line += f" {100 * increase:+8.2f} %, same best token {100 * best:5.1f} %, reading {speed:.2f} times fp32"
        print(line)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accordion", default="accordion", help="the program")
    parser.add_argument("--checkpoint", default="smollm2-135m", help="the model")
    parser.add_argument("--text", required=True, help="what is calibrated on")
    parser.add_argument("--held-out", help="what quality is measured on; without it, it is not")
    parser.add_argument("--windows", type=int, default=32, help="windows of the text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="N",
                        help="also give the peer's histograms that many windows at once, as it takes them by itself")
    parser.add_argument("--limit", type=float, default=10.0, metavar="GB", help="address space of a peer's process")
    parser.add_argument("--peers", nargs="*", default=[name for name, *_ in PEERS], help="which of the peer's methods")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything, which must not exist yet")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    out, accordion, limit = args.out.resolve(), args.accordion, int(args.limit * 1e9)

    def export(name, *more):
        run = measured([accordion, "export", "plain", args.checkpoint, str(out / name), *more])
        assert not run["failed"], run["failed"]
        return run

    export("fp32")
    # The peer's reader takes no tensors from files that have a second name.
    export("portable", "--target", "portable", "--weights", "copy")
    table, task = out / "ranges.safetensors", described(out / "portable")
    task["scratch"] = str(out)
    results, bundles = [], []

    def save():
        (out / "results.json").write_text(json.dumps(results, indent=1))

    def ours():
        run = measured([accordion, "--json", "calibrate", "ranges", str(out / "fp32"), "--text", args.text,
                        "--windows", str(args.windows), "--window-len", str(args.length), "-o", str(table)])
        assert not run["failed"], run["failed"]
        results.append(row("accordion, all calibrators", args.windows, args.length, run))

    # Before and after the peer: what else the machine does falls on both.
    ours()
    windows = windows_of(table, out / "portable", args.text)
    for method in dict.fromkeys(method for name, method, _ in PEERS if name in args.peers):
        cache = str(out / f"{method}.json")
        run = peer("calibrate", method=method, windows=windows, stride=1, cache=cache, limit=limit, **task)
        results.append(row(f"peer, {method}, window by window", len(windows), args.length, run))
        for count in args.growth if method == "Entropy" else []:
            more = peer("calibrate", method=method, windows=windows[:count], cache=str(out / "growth.json"),
                        limit=limit, **task)
            results.append(row(f"peer, {method}, all at once", count, args.length, more))
            if more["failed"]:
                break
        for name, _, outputs in [peer for peer in PEERS if peer[1] == method and peer[0] in args.peers]:
            if run["failed"]:
                continue
            quantized = str(out / "quantized.onnx")
            made = peer("quantize", method=method, outputs=outputs, cache=cache, quantized=quantized, **task)
            results.append(row(f"peer, {name}: quantizing", len(windows), args.length, made))
            assert not made["failed"], made["failed"]
            as_bundle(out, quantized, f"peer-{name}")
            bundles.append(f"peer-{name}")
    ours()
    save()
    if args.held_out:
        static = ["--precision", "int8", "--ranges", str(table)]
        kept = ["--keep-float", "v_proj", "--keep-float", "down_proj"]
        for calibrator in ["minmax", "entropy", "percentile=99.999"]:
            bundles.append(f"ours-{calibrator.split('=')[0]}")
            export(bundles[-1], *static, "--calibrator", calibrator, "--no-smoothing")
        for name, more in [("ours-smoothed", []), ("ours-kept", kept)]:
            bundles.append(name)
            results.append(row(f"{name}: exporting", args.windows, args.length, export(name, *static, *more)))
        results.append({"quality": quality(args, out, bundles)})
    save()


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child(json.load(sys.stdin))
    else:
        main()
