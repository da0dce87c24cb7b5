//! `accordion selftest gpu` with the real provider: every process of it, on libraries that compute nothing but our own kernels. What
//! depends on other numbers fails there, and has to become a line.

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
    let methods: Vec<_> = report["methods"].as_array().unwrap().iter().map(|cost| cost["method"].clone()).collect();
    assert_eq!(methods, ["plain", "plain", "rcc"], "{report}");
    for cost in report["methods"].as_array().unwrap() {
        assert_eq!((&cost["engine"], &cost["context"]), (&"ort-cuda fp16".into(), &4096.into()), "{cost}");
        assert!(cost["prefix_ms"].as_f64().unwrap() > 0.0 && cost["peak_device_bytes"].is_u64(), "{cost}");
    }
    let missing: Vec<_> = report["missing"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for method in ["homer", "sharedllm"] {
        let name = format!("{method} of llama-tiny at 4096 tokens: graph '");
        assert!(missing.iter().any(|line| line.starts_with(&name)), "{name}: {missing:?}");
    }
    // Models are gone.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}
