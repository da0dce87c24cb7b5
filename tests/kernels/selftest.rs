//! `accordion selftest gpu` from its arguments to its report, with a driver that runs kernels in the emulator and a cuBLASLt that
//! multiplies on the CPU.

use crate::library::{compile, cublaslt};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn driver() -> &'static Path {
    static DRIVER: OnceLock<PathBuf> = OnceLock::new();
    DRIVER.get_or_init(|| compile("libcuda.so", &["tests/kernels/driver.cpp"]))
}

/// Runs it with the libraries of these folders.
fn selftest(libraries: &[&Path], kernels: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    let folders = libraries.iter().map(|library| library.parent().unwrap());
    command.env("LD_LIBRARY_PATH", std::env::join_paths(folders).unwrap());
    command.args(["selftest", "gpu", "--kernels"]).arg(kernels).args(more);
    command
}

/// A folder of kernels, as far as the emulated driver looks.
fn kernels() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["topk_prune", "strided_compress", "append_rows"] {
        std::fs::write(folder.path().join(format!("{name}.sm_90.cubin")), b"\x7fELF").unwrap();
    }
    folder
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
#[ignore = "needs a C++ compiler"]
fn a_device_passes_and_is_timed() {
    let folder = kernels();
    let file = folder.path().join("result.json");
    let more = ["--json", "--output", file.to_str().unwrap()];
    let output = selftest(&[driver(), cublaslt()], folder.path(), &more).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(std::fs::read(&file).unwrap().trim_ascii(), output.stdout.trim_ascii());
    let report = report(&output);
    assert_eq!((&report["schema"], &report["passed"]), (&"accordion.selftest-gpu/1".into(), &true.into()));
    assert_eq!(report["device"]["name"], "Emulator, no GPU");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 65 && checks.iter().all(|check| check["passed"] == true));
    // What does not fit into the memory is said.
    let missing = report["missing"].to_string();
    assert!(missing.contains("7B") && !missing.contains("products"), "{missing}");
    assert!(report["copy_bandwidth"].as_f64().unwrap() > 0.0);
    let times = report["times"].as_array().unwrap();
    assert!(times.iter().any(|time| time["name"] == "TopKPrune, as a CUDA graph"), "{times:?}");
}

#[test]
#[ignore = "needs a C++ compiler"]
fn a_wrong_result_is_found() {
    let kernels = kernels();
    let mut command = selftest(&[driver()], kernels.path(), &["--no-times", "--quiet"]);
    let output = command.env("ACCORDION_EMULATOR_FAULT", "keep").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("keep_idx[0] is"), "{text}");
    assert!(text.contains("Not done:") && text.contains("no cuBLASLt library"), "{text}");
}

#[test]
#[ignore = "needs a C++ compiler"]
fn what_is_not_there_is_an_error() {
    let empty = tempfile::tempdir().unwrap();
    for (folder, more, expected) in [
        (kernels().path(), &["--device", "3"][..], "there is no GPU 3: the NVIDIA driver has 1"),
        (empty.path(), &[], "topk_prune.sm_90.cubin"),
    ] {
        let output = selftest(&[driver()], folder, more).arg("--quiet").output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(2), &b""[..]), "{error}");
        assert!(error.starts_with("error: ") && error.contains(expected), "{error}");
    }
}
