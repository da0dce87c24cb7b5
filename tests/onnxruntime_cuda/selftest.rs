//! `accordion selftest gpu` with the real provider: every process of it, on libraries that compute nothing but our own kernels. What
//! depends on other numbers fails there or not, as memory happens to be, and has to become a line.

use super::{driver, kernels, prepared, runtime};
use serde_json::Value;
use std::process::Command;

#[test]
#[ignore = "needs what `prepare` fetches"]
fn methods_are_measured_and_one_that_fails_is_a_line() {
    let folder = tempfile::tempdir().unwrap();
    kernels(folder.path());
    // Processes of the program look for kernels beside it.
    let program = folder.path().join("accordion");
    std::fs::copy(env!("CARGO_BIN_EXE_accordion"), &program).unwrap();
    let output = Command::new(program)
        .env("ORT_DYLIB_PATH", prepared())
        .env("LD_LIBRARY_PATH", std::env::join_paths([driver(), runtime()]).unwrap())
        .args(["selftest", "gpu", "--shape", "tiny", "--quick", "--json", "--quiet", "--work-dir"])
        .arg(folder.path())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(report["runtime"].as_str().unwrap().starts_with("ONNX Runtime 1.31.1"), "{report}");
    let costs = report["methods"].as_array().unwrap();
    let measured = |method: &str| costs.iter().filter(|cost| cost["method"] == method).count();
    assert_eq!(measured("plain"), 2, "{costs:?}");
    for cost in costs {
        assert_eq!((&cost["engine"], &cost["context"]), (&"ort-cuda fp16".into(), &4096.into()), "{cost}");
        assert!(cost["prefix_ms"].as_f64().unwrap() > 0.0 && cost["peak_device_bytes"].is_u64(), "{cost}");
    }
    let missing: Vec<_> = report["missing"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for (method, model) in [("homer", "llama-tiny"), ("sharedllm", "llama-tiny"), ("rcc", "rcc-pythia-tiny")] {
        let name = format!("{method} of {model} at 4096 tokens: ");
        let lines = missing.iter().filter(|line| line.starts_with(&name)).count();
        assert_eq!(measured(method) + lines, 1, "{name}: {missing:?}");
    }
    // Its similarities take cuDNN, which is not replaced.
    assert_eq!(measured("sharedllm"), 0, "{costs:?}");
    // Models are gone.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}
