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
