//! The plugin library, built without nvcc, in NVIDIA's registry; see `plugins.cpp` beside this file.

use super::prepared;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 4] = [
    "plugins/tensorrt/plugins.cpp",
    "plugins/tensorrt/cpu.cpp",
    "plugins/topk_prune/tensorrt.cpp",
    "plugins/strided_compress/tensorrt.cpp",
];

/// The system's compiler with these of NVIDIA's headers, ready for sources.
fn compiler(headers: &Path) -> Command {
    let mut command = Command::new("c++");
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("-isystem").arg(headers);
    command.args([
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-deprecated-declarations",
        "-Iplugins/tensorrt",
    ]);
    command
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The plugin library in `folder`.
fn library(headers: &Path, folder: &Path) -> PathBuf {
    let library = folder.join("libaccordion_plugins.so");
    succeed(compiler(headers).args(["-shared", "-fPIC", "-fvisibility=hidden"]).args(SOURCES).arg("-o").arg(&library));
    library
}

/// Every version whose headers there are; a plugin's interface is the same in both flavours.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn plugins_and_shim_compile_with_every_version_of_the_headers() {
    let mut versions = 0;
    for entry in std::fs::read_dir(prepared("headers")).unwrap() {
        let headers = entry.unwrap().path();
        if headers.is_dir() {
            succeed(compiler(&headers).arg("-fsyntax-only").args(SOURCES).arg("plugins/tensorrt/shim.cpp"));
            versions += 1;
        }
    }
    assert_eq!(versions, 6);
}

/// One library, in the registry of its own version and in an older one.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn plugins_keep_their_contracts_in_the_registry() {
    let folder = tempfile::tempdir().unwrap();
    let headers = prepared("headers/TRT-Enterprise-11.4");
    let plugins = library(&headers, folder.path());
    let program = folder.path().join("plugins");
    succeed(compiler(&headers).arg("tests/tensorrt/plugins.cpp").arg("-o").arg(&program).arg("-ldl"));
    for version in ["libraries", "libraries-older"] {
        let registry = prepared(version).join("tensorrt_dispatch_libs/libnvinfer_dispatch.so.11");
        let said = succeed(Command::new(&program).arg(registry).arg(&plugins));
        assert!(said.ends_with(" checks passed\n"), "{said}");
    }
}
