//! ONNX Runtime's own CUDA provider, as far as it works without a GPU: `prepare` beside this file puts it into
//! target/onnxruntime-gpu, and `runtime.cpp` stands for CUDA's libraries. The provider loads the graphs, places their nodes and
//! moves tensors as on a GPU; what it computes is zero.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion::environment::driver_library;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn prepared() -> PathBuf {
    let library = root().join("target/onnxruntime-gpu/onnxruntime/capi/libonnxruntime.so.1.31.1");
    assert!(library.exists(), "{} is not there: run tests/onnxruntime_cuda/prepare", library.display());
    library
}

/// Builds a shared library in `folder`, and other names for it.
fn compile(folder: &Path, name: &str, source: &str, others: &[&str]) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unknown-pragmas", "-I"])
        .arg(root().join("plugins/cuda"))
        .arg(root().join(source))
        .arg("-o")
        .arg(folder.join(name))
        .arg("-ldl")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for other in others {
        std::os::unix::fs::symlink(name, folder.join(other)).unwrap();
    }
}

/// A folder with a driver that runs our kernels in the emulator.
fn driver() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = || {
        let folder = tempfile::tempdir().unwrap();
        compile(folder.path(), "libcuda.so", "tests/kernels/driver.cpp", &["libcuda.so.1"]);
        folder
    };
    FOLDER.get_or_init(made).path()
}

/// A folder with CUDA's other libraries.
fn runtime() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = || {
        let folder = tempfile::tempdir().unwrap();
        let others = ["libcublas.so.13", "libcublasLt.so.13", "libcublasLt.so", "libcurand.so.10"];
        compile(folder.path(), "libcudart.so.13", "tests/onnxruntime_cuda/runtime.cpp", &others);
        folder
    };
    FOLDER.get_or_init(made).path()
}

/// A bundle of `method` of a golden case, in `folder`.
fn bundle(method: &str, folder: &Path) -> PathBuf {
    let goldens = root().join("tests/goldens").join(method);
    let (target, recipe) = (Target::Portable, Recipe::fp32());
    let bundle = match method {
        "homer" => {
            let case = HomerCase::open(&goldens.join("homer_C.json")).unwrap();
            golden::homer::bundle(&case, &golden::homer::plan(&case).unwrap(), target, &recipe, folder)
        }
        "rcc" => {
            let case = RccCase::open(&goldens.join("neox_r32.cases.safetensors")).unwrap();
            golden::rcc::bundle(&case, target, &recipe, folder)
        }
        _ => {
            let case = SharedLlmCase::open(&goldens.join("case_q4.json")).unwrap();
            golden::sharedllm::bundle(&case, case.weights_path(), Quirks::Faithful, target, &recipe, folder)
        }
    };
    bundle.unwrap().dir().to_owned()
}

/// `accordion profile` of `bundle` with the libraries of these folders.
fn profile(bundle: &Path, libraries: &[&Path], more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.env("ORT_DYLIB_PATH", prepared()).env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    command.args(["profile", "--quiet", "--json", "--engine", "ort-cuda"]).arg(bundle).args(more);
    command
}

fn refused(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    error
}

#[test]
#[ignore = "needs what `prepare` fetches"]
fn without_a_driver_or_libraries_it_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle("homer", folder.path());
    // A machine that has a driver has other reasons to refuse, or none.
    if driver_library().is_err() {
        let error = refused(&profile(&bundle, &[], &[]).output().unwrap());
        assert!(error.contains("ort-cuda: no NVIDIA driver library (libcuda)"), "{error}");
    }
    let error = refused(&profile(&bundle, &[driver()], &[]).output().unwrap());
    for part in ["ort-cuda: ", "libcublasLt.so.13", "cuDNN 9", "LD_LIBRARY_PATH"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
