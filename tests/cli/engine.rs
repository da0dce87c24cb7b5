//! `--engine`, where there is no GPU.

use crate::tiny::Tiny;

#[test]
fn an_engine_that_is_not_there_says_what_is_missing() {
    let tiny = Tiny::new();
    let cuda = |bundle: &str| tiny.refuse(&["profile", bundle, "--context", "32", "--engine", "ort-cuda"]);
    let error = cuda("plain");
    assert!(error.contains("--target portable"), "{error}");

    tiny.succeed(&["export", "plain", "checkpoint", "portable", "--target", "portable"]);
    let error = cuda("portable");
    // What is found first depends on the machine: a build without CUDA, or one without a driver.
    assert!(error.contains("ort-cuda: ") && error.contains("onnxruntime-gpu"), "{error}");
}

#[test]
fn what_an_engine_would_ignore_is_refused() {
    let tiny = Tiny::new();
    tiny.succeed(&["export", "plain", "checkpoint", "portable", "--target", "portable"]);
    let refused = |engine: &str, flags: &[&str], reason: &str| {
        let profile = ["profile", "portable", "--context", "32", "--engine", engine];
        let error = tiny.refuse(&[&profile[..], flags].concat());
        assert!(error.contains(reason), "{engine} {flags:?}: {error}");
    };
    for engine in ["ort-cpu", "ort-cuda"] {
        refused(engine, &["--trust"], "--trust is for --engine tensorrt");
        refused(engine, &["--plugins", "library.so"], "--plugins is for --engine tensorrt");
    }
    for engine in ["ort-cpu", "tensorrt", "tensorrt-rtx"] {
        refused(engine, &["--gpu", "1"], "--gpu is for --engine ort-cuda");
    }
    for engine in ["tensorrt", "tensorrt-rtx"] {
        refused(engine, &["--operators", "portable"], "--operators is for ONNX Runtime");
    }
}
