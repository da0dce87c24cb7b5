"""Runs model.onnx on inputs.npz in stock onnxruntime and holds what comes out against expected.npz.

Usage: python reproduce.py. Exits with 1 if the difference is there. Needs numpy and onnxruntime.

Polygraphy takes the same inputs: polygraphy run model.onnx --onnxrt --data-loader-script reproduce.py
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def load_data():
    """The inputs, by name, once."""
    with np.load(HERE / "inputs.npz") as inputs:
        yield dict(inputs)


def main():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    with np.load(HERE / "expected.npz") as arrays:
        ((name, expected),) = arrays.items()
    (found,) = session.run([name], next(load_data()))
    bounds = json.loads((HERE / "reproducer.json").read_text())["bounds"]
    if found.shape != expected.shape:
        print(f"{name} has shape {found.shape}, expected {expected.shape}")
        return 1
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    worst = np.unravel_index(difference.argmax(), difference.shape)
    norm = np.linalg.norm(difference) / max(np.linalg.norm(expected.astype(np.float64)), 1e-300)
    exact = np.issubdtype(expected.dtype, np.integer)
    allowed = 0.0 if exact else max(bounds["abs"], bounds["rel"] * float(np.abs(expected).max()))
    # Written so that NaN is a difference.
    within = difference.max() <= allowed and (difference.max() <= bounds["abs"] or norm <= bounds["norm_rel"])
    place = [int(i) for i in worst]
    print(f"{name}: {found[worst]} at {place}, expected {expected[worst]}")
    print(f"max abs {difference.max():.3e}, allowed {allowed:.3e}; {norm:.3e} of its norm, allowed {bounds['norm_rel']:.3e}")
    print("within the bounds" if within else "DIFFERENT")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
