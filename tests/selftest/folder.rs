//! The folder for a machine with a GPU: assembled with stand-ins for kernels and provider, joined, and its bundles held to their
//! expected values on the CPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Files of a provider that are longer than a part.
const PROVIDER: [(&str, usize); 3] = [
    ("libonnxruntime.so.1.31.1", 3000),
    ("libonnxruntime_providers_shared.so", 10),
    ("libonnxruntime_providers_cuda.so", 200_000),
];

/// Bytes that do not compress.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let step = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((*state >> 56) as u8)
    };
    let mut state = seed;
    std::iter::from_fn(|| step(&mut state)).take(count).collect()
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The script, with this build's program and these kernels.
fn assemble(kernels: &Path, arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/cuda/selftest-folder.sh");
    let mut command = Command::new(script);
    command.env("ACCORDION", env!("CARGO_BIN_EXE_accordion")).env("KERNELS", kernels);
    run(command.args(arguments))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_folder_is_assembled_joined_and_as_expected() {
    let workspace = tempfile::tempdir().unwrap();
    let path = |name: &str| workspace.path().join(name);
    fs::create_dir(path("kernels")).unwrap();
    fs::write(path("kernels/topk_prune.sm_90.cubin"), "stand-in").unwrap();
    fs::create_dir(path("provider")).unwrap();
    for (seed, (name, bytes)) in PROVIDER.iter().enumerate() {
        fs::write(path("provider").join(name), noise(seed as u64, *bytes)).unwrap();
    }
    let (folder, parts) = (path("folder"), path("folder.parts"));
    let words = |path: &Path| path.to_str().unwrap().to_owned();
    let (provider, goal) = (words(&path("provider")), words(&folder));
    let output = assemble(&path("kernels"), &["--provider", &provider, "--part-bytes", "50000", &goal]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(path("folder.tar.gz").is_file());
    let readme = fs::read_to_string(folder.join("README.txt")).unwrap();
    assert!(readme.contains("./join.sh") && readme.contains("./run.sh --shape smollm2"), "{readme}");
    let all = files(&parts);
    assert!(all.len() > 3, "{all:?}");
    assert!(all.iter().all(|part| fs::metadata(part).unwrap().len() <= 50_000));

    let join = || run(Command::new(folder.join("join.sh")).arg(&parts));
    let joined = folder.join("onnxruntime");
    // A part that was changed on the way, and one that did not arrive.
    let part = fs::read(&all[1]).unwrap();
    let mut changed = part.clone();
    changed[100] ^= 1;
    fs::write(&all[1], &changed).unwrap();
    let output = join();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("onnxruntime.tar.gz.01: SHA-256 is "), "{}", said(&output));
    fs::remove_file(&all[1]).unwrap();
    let output = join();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("onnxruntime.tar.gz.01 is missing"), "{}", said(&output));
    assert!(!joined.exists());
    assert!(files(&folder).iter().all(|file| !file.file_name().unwrap().to_str().unwrap().starts_with('.')));

    fs::write(&all[1], part).unwrap();
    let output = join();
    assert!(output.status.success(), "{}", said(&output));
    for (seed, (name, bytes)) in PROVIDER.iter().enumerate() {
        assert_eq!(fs::read(joined.join(name)).unwrap(), noise(seed as u64, *bytes), "{name}");
    }

    for method in ["plain", "homer", "rcc", "sharedllm"] {
        let verify = |expected: &str| {
            let mut command = Command::new(folder.join("accordion"));
            command.current_dir(&folder).args(["verify", "--quiet", "--taps", "result"]);
            let expected = format!("expected/{expected}.safetensors");
            run(command.arg(format!("bundles/{method}")).args(["--against", &expected]))
        };
        let output = verify(method);
        assert!(output.status.success(), "{method}: {}", said(&output));
    }
}

#[test]
fn what_cannot_be_assembled_leaves_nothing() {
    let workspace = tempfile::tempdir().unwrap();
    let goal = workspace.path().join("folder");
    let goal = goal.to_str().unwrap();
    for (arguments, expected) in [
        (&["--part-bytes", "99999999", goal][..], "--part-bytes 99999999: expected 1 to 62914560"),
        (&["--parts", goal], "--parts: unknown option"),
        (&["--library", "x", goal], "--library needs --provider"),
    ] {
        let output = assemble(workspace.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
    }
    assert_eq!(files(workspace.path()).len(), 0);
}
