//! NVIDIA's libraries, as far as they work without a GPU: `prepare` beside this file puts them into target/tensorrt.

#![allow(clippy::unwrap_used, clippy::panic)]

mod double;
mod execution;
mod graphs;
// Of which a part is needed here.
#[allow(dead_code)]
#[path = "../precision/host_steps.rs"]
mod host_steps;
mod methods;
mod plugins;
mod profiling;
mod ranges;
mod refusals;
mod steps;
mod taps;

use std::path::{Path, PathBuf};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Where `prepare` put things.
fn prepared(what: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tensorrt").join(what);
    assert!(path.exists(), "{} is not there: run tests/tensorrt/prepare", path.display());
    path
}
