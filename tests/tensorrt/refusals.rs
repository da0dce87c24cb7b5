//! `accordion build` where something is missing: it says what, ends with 2, and leaves nothing behind.

use super::goldens;
use accordion::bundle::MethodSettings;
use accordion::checkpoint::config_json;
use accordion::goldens::HomerCase;
use accordion::precision::Recipe;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A plain bundle for a target.
fn bundle(target: Target) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let files = [("config.json", config_json(&case.architecture))];
    let checkpoint = golden::checkpoint(folder.path(), case.weights_path(), &files).unwrap();
    let dir = golden::exported(&checkpoint, MethodSettings::Plain, target, &Recipe::fp32()).unwrap().dir().to_owned();
    (folder, dir)
}

/// The message of a build that cannot be done.
fn refused(bundle: &Path, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.arg("build").arg(bundle).args(more).env("ACCORDION_CACHE", bundle.with_file_name("cache"));
    let output = command.env("RUST_BACKTRACE", "0").output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && output.stdout.is_empty(), "{message}");
    assert!(!bundle.join("engines").exists());
    message
}

#[test]
fn graphs_for_another_runtime_are_not_built() {
    let (_folder, bundle) = bundle(Target::OrtCpu);
    let message = refused(&bundle, &["--runtime", "tensorrt-rtx"]);
    assert!(message.contains("--target portable"), "{message}");
}

#[test]
fn what_is_missing_is_named() {
    let (folder, bundle) = bundle(Target::Portable);
    let root = folder.path().join("package");
    fs::create_dir_all(root.join("lib")).unwrap();
    for name in ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"] {
        fs::write(root.join("lib").join(name), "not a library").unwrap();
    }
    let named = ["--runtime", "tensorrt-rtx", "--root", root.to_str().unwrap()];
    let message = refused(&bundle, &named);
    assert!(message.contains("NvInfer.h") && message.contains("TENSORRT_RTX_ROOT"), "{message}");

    // Headers that are none.
    fs::create_dir(root.join("include")).unwrap();
    for name in ["NvInfer.h", "NvOnnxParser.h", "NvInferRuntime.h"] {
        fs::write(root.join("include").join(name), "").unwrap();
    }
    fs::write(root.join("include/NvInferVersion.h"), "#define TRT_MAJOR_RTX 1\n").unwrap();
    let message = refused(&bundle, &named);
    assert!(message.contains("include: ") && message.contains("error"), "{message}");
    let cached: Vec<_> = fs::read_dir(folder.path().join("cache")).unwrap().collect();
    assert!(cached.is_empty(), "{cached:?}");

    let message = refused(&bundle, &["--runtime", "tensorrt-rtx", "--plugins", "libaccordion_plugins.so"]);
    assert!(message.contains("no plugins"), "{message}");
}
