//! ONNX Runtime's own CUDA provider, as far as it works without a GPU: `prepare` beside this file puts it into
//! target/onnxruntime-gpu, and `runtime.cpp` stands for CUDA's libraries. The provider loads the graphs, places their nodes and
//! moves tensors as on a GPU; what it computes is zero, except in our own operators.

#![allow(clippy::unwrap_used, clippy::panic)]

mod operators;
mod precisions;
mod selftest;

use accordion::bundle::Bundle;
use accordion::cuda::Origin;
use accordion::environment::driver_library;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::{Engines, plain};
use accordion::precision::Recipe;
use accordion::runtime::Loader as _;
use accordion::runtime::bound::Bound;
use accordion::runtime::locate::{LoadOptions, LoadedRuntime, load};
use accordion::runtime::ort_cuda::{self, Gpu, OrtCudaOptions};
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
        let others = ["libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"];
        compile(folder.path(), "libcudart.so.13", "tests/onnxruntime_cuda/runtime.cpp", &others);
        // Ours is found under this name, and multiplies.
        compile(folder.path(), "libcublasLt.so", "tests/kernels/cublaslt.cpp", &[]);
        folder
    };
    FOLDER.get_or_init(made).path()
}

fn goldens(method: &str) -> PathBuf {
    root().join("tests/goldens").join(method)
}

/// A bundle of `method` of a golden case, in `folder`.
fn bundle(method: &str, folder: &Path) -> PathBuf {
    let goldens = goldens(method);
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

/// What the libraries recorded of one kind: bytes of each.
fn recorded(log: &Path, kind: &str) -> Vec<usize> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix(kind)).map(|bytes| bytes.trim().parse().unwrap()).collect()
}

/// A folder of kernels, as far as the emulated driver looks.
fn kernels(folder: &Path) -> PathBuf {
    let kernels = folder.join("kernels");
    std::fs::create_dir(&kernels).unwrap();
    for name in ["topk_prune", "strided_compress"] {
        std::fs::write(kernels.join(format!("{name}.sm_90.cubin")), b"\x7fELF").unwrap();
    }
    kernels
}

/// `accordion profile` of `bundle` with the libraries of these folders.
fn profile(bundle: &Path, libraries: &[&Path]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.env("ORT_DYLIB_PATH", prepared()).env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    command.args(["profile", "--quiet", "--json", "--engine", "ort-cuda"]).arg(bundle);
    command.args(["--context", "32", "--prefix", "0", "--suffix", "4"]);
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
    let bundle = bundle("rcc", folder.path());
    // A machine that has a driver has other reasons to refuse, or none.
    if driver_library().is_err() {
        let error = refused(&profile(&bundle, &[]).output().unwrap());
        assert!(error.contains("ort-cuda: no NVIDIA driver library (libcuda)"), "{error}");
    }
    let error = refused(&profile(&bundle, &[driver()]).output().unwrap());
    for part in ["ort-cuda: ", "libcublasLt.so.13", "cuDNN 9", "LD_LIBRARY_PATH"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

const METHODS: [&str; 3] = ["homer", "rcc", "sharedllm"];

/// Names the test that a child is to run, and the folders of its kernels and bundles.
const CHILD: &str = "ACCORDION_TEST_FOLDER";

#[test]
#[ignore = "needs what `prepare` fetches"]
fn every_graph_is_the_gpus_with_one_copy_of_the_weights_and_caches_stay_there() {
    let folder = tempfile::tempdir().unwrap();
    kernels(folder.path());
    for method in METHODS {
        let out = folder.path().join(method);
        std::fs::create_dir(&out).unwrap();
        let made = bundle(method, &out);
        std::os::unix::fs::symlink(made, folder.path().join(format!("{method}-bundle"))).unwrap();
    }
    child_process("child", folder.path());
}

/// Runs the test `name` where the libraries are replaced: ONNX Runtime is loaded once per process, and the linker reads its variable
/// at the start.
fn child_process(name: &str, folder: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--include-ignored", "--nocapture"])
        .env(CHILD, folder)
        .env("ORT_DYLIB_PATH", prepared())
        .env("LD_LIBRARY_PATH", std::env::join_paths([driver(), runtime()]).unwrap())
        .env("ACCORDION_EMULATOR_LOG", folder.join("log"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    println!("{said}");
}

/// What loads graphs of `bundle` into the provider.
fn open(runtime: &'static LoadedRuntime, bundle: &Bundle, kernels: Option<Origin>) -> Bound<Gpu> {
    let options = OrtCudaOptions { device: 0, kernels, allow_fallback: false };
    ort_cuda::open(runtime, bundle.weights().clone(), &options).unwrap()
}

/// What runs where the libraries are replaced.
#[test]
#[ignore = "runs in a process of its own, started by another test"]
fn child() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let log = PathBuf::from(std::env::var_os("ACCORDION_EMULATOR_LOG").unwrap());
    let runtime = load(LoadOptions::default()).unwrap();
    for method in METHODS {
        let bundle = Bundle::open(folder.join(format!("{method}-bundle"))).unwrap();
        for kernels in [None, Some(Origin::Folder(folder.join("kernels")))] {
            let what = format!("{method}, fused {}", kernels.is_some());
            let loader = open(runtime, &bundle, kernels);
            let before: usize = recorded(&log, "memory").iter().sum();
            let mut weights = 0;
            for (name, signature) in bundle.manifest().graphs.keys().map(|name| (name, bundle.signature(name).unwrap()))
            {
                let _engine = loader.load(name, &bundle.graph(name).unwrap(), &signature.weights).unwrap();
                let bytes = |weight: &String| bundle.weights().tensor(weight).unwrap().byte_len();
                weights += signature.weights.iter().map(bytes).sum::<usize>();
            }
            // What is left is constants, and weights that a product wants turned around.
            let taken = recorded(&log, "memory").iter().sum::<usize>() - before;
            println!("{what}: {taken} bytes beside the {weights} of the weights");
            assert!(taken * 4 < weights, "{what}: {taken} bytes beside the {weights} of the weights");
        }
    }
    let bundle = Bundle::open(folder.join("rcc-bundle")).unwrap();
    operators::check(runtime, bundle.weights(), &folder.join("kernels"));
    // A cache that grows: lengths go to the host between the nodes, and nothing else does.
    let mut engines = Engines::new(&bundle, Box::new(open(runtime, &bundle, None)));
    let before = recorded(&log, "to the host").len();
    let state = plain::prefill(&mut engines, &(0..40).collect::<Vec<u32>>(), |_| {}).unwrap();
    let mut sequence = Sequence::continue_from(&engines, &state, 3, Continuation::Next).unwrap();
    for id in 0..3 {
        sequence.forward(&mut engines, &[id], 1).unwrap();
    }
    assert_eq!(sequence.len(), 43);
    let copies = &recorded(&log, "to the host")[before..];
    println!("{copies:?}");
    assert!(copies.iter().all(|&bytes| bytes == 8), "{copies:?}");
}
