//! `accordion doctor`.

#![allow(clippy::unwrap_used)]

use crate::program::{Run, accordion, command};
use accordion::runtime::locate::{LoadOptions, load};
use serde_json::Value;

#[test]
fn a_machine_with_onnx_runtime_is_healthy() {
    // Fetches it, where there is none.
    load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let report = accordion(["doctor", "--json"]).json("accordion.doctor/1");
    assert_eq!((&report["usable"], &report["onnxruntime"]["status"]), (&true.into(), &"present".into()));
    let text = accordion(["doctor"]).output();
    assert!(text.contains(report["onnxruntime"]["version"].as_str().unwrap()), "{text}");
    assert!(text.contains("CPUExecutionProvider") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn without_onnx_runtime_the_check_fails_and_says_why() {
    let root = tempfile::tempdir().unwrap();
    let library = root.path().join("libonnxruntime.so");
    std::fs::write(&library, "no library").unwrap();
    let doctor = |more: &[&str]| Run::of(command().arg("doctor").args(more).env("ORT_DYLIB_PATH", &library));
    let run = doctor(&[]);
    assert_eq!((run.code, run.err.as_str()), (Some(1), ""), "{run:?}");
    assert!(run.out.contains("missing") && run.out.contains(library.to_str().unwrap()), "{}", run.out);
    let report: Value = serde_json::from_str(&doctor(&["--json"]).out).unwrap();
    assert_eq!((&report["usable"], &report["onnxruntime"]["status"]), (&false.into(), &"absent".into()));
}
