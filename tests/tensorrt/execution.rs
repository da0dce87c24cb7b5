//! Engines behind a double of the shim, under an emulated driver: everything between the pipeline and NVIDIA's library. They need a
//! C++ compiler (`CXX`, else `c++`), so they are ignored unless asked for:
//!
//! ```text
//! cargo test --release --test tensorrt execution -- --ignored
//! ```

use super::double::{Build, Machine, build, driver, shim, stepping};
use super::{goldens, prepared};
use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::config_json;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::Engines;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::prompt::PromptIds;
use accordion::precision::Recipe;
use accordion::tensor::Tensor;
use accordion::tensorrt::ExecutionOptions;
use accordion::tensorrt::engines::sha256;
use accordion::tensorrt::ranges::Workload;
use accordion::verify::golden::{self, Tensors};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks};
use std::path::Path;
use std::process::{Command, Output};

pub(super) fn workload(lengths: PromptLengths) -> Workload {
    Workload { lengths, new_tokens: 16, width: 4, policy: ChunkPolicy::FineTuning, plain: false }
}

/// Runs `compute` on ONNX Runtime and on engines that have every tap, and compares bit by bit.
fn assert_same(bundle: &Bundle, name: &str, lengths: PromptLengths, compute: impl Fn(&mut Engines<'_>) -> Tensors) {
    let machine = Machine::open();
    build(bundle, Build { workload: workload(lengths), taps: true, any_length: true });
    let expected = compute(&mut stepping(bundle));
    let found = compute(&mut machine.engines(bundle));
    assert!(expected.keys().eq(found.keys()), "{name}");
    for (tensor, expected) in &expected {
        let found = &found[tensor];
        let same =
            (found.dtype(), found.shape(), found.bytes()) == (expected.dtype(), expected.shape(), expected.bytes());
        assert!(same, "{name}: {tensor} is {found:?}, expected {expected:?}");
    }
    drop(found);
    assert_eq!(machine.live(), 0, "{name}");
}

/// Trees whose nodes run layers or only join, leaf by leaf and level by level, then decoding, at once and token by token.
#[test]
#[ignore = "needs a C++ compiler"]
fn homers_trees_are_those_of_onnx_runtime() {
    for name in ["C", "E", "F"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{name}.json"))).unwrap();
        let plan = golden::homer::plan(&case).unwrap();
        for width in [1, 2, usize::MAX] {
            let folder = tempfile::tempdir().unwrap();
            let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
            assert_same(&bundle, name, case.lengths(), |engines| {
                golden::homer::graphs(&case, &plan, engines, width).unwrap()
            });
        }
    }
}

/// Slots that grow segment by segment, with Mamba and transformers as encoder.
#[test]
#[ignore = "needs a C++ compiler"]
fn rccs_slots_are_those_of_onnx_runtime() {
    for path in RccCase::find(&goldens().join("rcc")).unwrap() {
        let case = RccCase::open(&path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let bundle = golden::rcc::bundle(&case, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let lengths = PromptLengths { prefix: 0, context: 1000, suffix: 8 };
        assert_same(&bundle, &case.name, lengths, |engines| golden::rcc::graphs(&case, engines, 2).unwrap());
    }
}

/// Injected keys and values, in both variants.
#[test]
#[ignore = "needs a C++ compiler"]
fn sharedllms_injections_are_those_of_onnx_runtime() {
    for path in SharedLlmCase::find(&goldens().join("sharedllm")).unwrap() {
        let case = SharedLlmCase::open(&path).unwrap();
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let (folder, weights) = (tempfile::tempdir().unwrap(), case.weights_path());
            let recipe = Recipe::fp32();
            let bundle =
                golden::sharedllm::bundle(&case, weights, quirks, Target::Portable, &recipe, folder.path()).unwrap();
            let lengths = PromptLengths { prefix: 0, context: case.context_ids.len(), suffix: 0 };
            assert_same(&bundle, &case.name, lengths, |engines| {
                golden::sharedllm::graphs(&case, engines, quirks, 2).unwrap()
            });
        }
    }
}

/// A case of HOMER with a bundle of its model.
pub(crate) struct Subject {
    pub(crate) case: HomerCase,
    pub(crate) bundle: Bundle,
    folder: tempfile::TempDir,
}

impl Subject {
    pub(crate) fn homer() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
        let (plan, folder) = (golden::homer::plan(&case).unwrap(), tempfile::tempdir().unwrap());
        let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        Self { case, bundle, folder }
    }

    pub(crate) fn plain() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = [("config.json", config_json(&case.architecture))];
        let checkpoint = golden::checkpoint(folder.path(), case.weights_path(), &files).unwrap();
        let bundle = golden::exported(&checkpoint, MethodSettings::Plain, Target::Portable, &Recipe::fp32()).unwrap();
        Self { case, bundle, folder }
    }

    pub(crate) fn built(self) -> Self {
        self.build();
        self
    }

    pub(crate) fn build(&self) {
        let workload = Workload { plain: true, ..workload(self.case.lengths()) };
        build(&self.bundle, Build { workload, taps: false, any_length: false });
    }

    pub(crate) fn prompt(&self) -> PromptIds {
        let (prefix, context) = (self.case.prefix_ids.clone(), self.case.context_ids.clone());
        PromptIds { prefix, context, suffix: self.case.suffix_ids.clone() }
    }

    pub(crate) fn compression(&self) -> Compression {
        match self.bundle.manifest().method.name() {
            "plain" => Compression::Plain { allow_overlong: true },
            _ => Compression::Homer(Homer {
                settings: self.case.settings,
                significance: Some(Significance::Uncalibrated),
                width: 1,
            }),
        }
    }
}

/// The cache never leaves the device, where it grows, too: a token costs its id and position on the way there, and its logits on the
/// way back.
#[test]
#[ignore = "needs a C++ compiler"]
fn decoding_copies_ids_and_logits_and_nothing_else() {
    let machine = Machine::open();
    for subject in [Subject::plain().built(), Subject::homer().built()] {
        let (arch, prompt) = (&subject.case.architecture, subject.prompt());
        let mut engines = machine.growing(&subject.bundle);
        let logits = 4 * arch.vocab_size as u64;
        let before = machine.counts();
        let state = subject.compression().compress(&mut engines, &prompt, &mut |_, _| {}).unwrap();
        let compressed = machine.counts() - before;
        // HOMER reads the positions of the root, too.
        let positions =
            if subject.bundle.manifest().method.name() == "homer" { 8 * state.tokens_kept() as u64 } else { 0 };
        let read = compressed.to_host - logits - positions;
        assert_eq!(read % logits, 0, "{compressed:?}");
        let mut sequence = Sequence::continue_from(&engines, &state, 0, Continuation::Next).unwrap();
        let row = 2 * 4 * (arch.num_layers * arch.num_kv_heads * arch.head_dim) as u64;
        for step in 0..8 {
            let before = machine.counts();
            sequence.forward(&mut engines, &[step + 1], 1).unwrap();
            let copied = machine.counts() - before;
            assert_eq!((copied.to_device, copied.to_host), (16, logits), "step {step}");
            // Layers of a tree's cache may begin anywhere in it; those of the decoder's own cache do not.
            let moved = row * state.tokens_kept() as u64;
            assert!(copied.on_device <= if step == 0 { moved } else { 0 }, "step {step}: {copied:?}");
        }
        drop((state, sequence));
        drop(engines);
        assert_eq!(machine.live(), 0);
    }
}

/// The pipeline's own lengths fit the ranges that were built, and the result is ONNX Runtime's.
#[test]
#[ignore = "needs a C++ compiler"]
fn a_prompt_of_the_built_lengths_is_served() {
    let machine = Machine::open();
    for subject in [Subject::plain().built(), Subject::homer().built()] {
        let prompt = subject.prompt();
        let run = |engines: &mut Engines<'_>| {
            let state = subject.compression().compress(engines, &prompt, &mut |_, _| {}).unwrap();
            let mut sequence = Sequence::continue_from(engines, &state, 0, Continuation::Next).unwrap();
            let mut logits = vec![state.logits.clone()];
            // The baseline on the same decoder.
            let plain = Compression::Plain { allow_overlong: true };
            logits.push(plain.compress(engines, &prompt, &mut |_, _| {}).unwrap().logits);
            logits.extend((0..8).map(|id| sequence.forward(engines, &[id], 1).unwrap().to_f32()));
            let cache: Vec<Vec<u8>> =
                sequence.cache().unwrap().iter().flatten().map(|tensor| tensor.bytes().to_vec()).collect();
            (logits, cache)
        };
        let expected = run(&mut stepping(&subject.bundle));
        assert!(run(&mut machine.engines(&subject.bundle)) == expected);
    }
}

/// The same through the shim itself, compiled with NVIDIA's headers over a library of such classes.
#[test]
#[ignore = "needs NVIDIA's headers: tests/tensorrt/prepare"]
fn the_shim_hands_on_what_it_is_given() {
    let machine = Machine::open();
    let headers = prepared("headers/TRT-Enterprise-11.4");
    for subject in [Subject::plain().built(), Subject::homer().built()] {
        let prompt = subject.prompt();
        let run = |engines: &mut Engines<'_>| {
            let state = subject.compression().compress(engines, &prompt, &mut |_, _| {}).unwrap();
            let mut sequence = Sequence::continue_from(engines, &state, 0, Continuation::Next).unwrap();
            (0..4).map(|id| sequence.forward(engines, &[id], 1).unwrap().to_f32()).collect::<Vec<_>>()
        };
        let expected = run(&mut stepping(&subject.bundle));
        assert!(run(&mut machine.engines_of_nvidia(&subject.bundle, &headers)) == expected);
        assert_eq!(machine.live(), 0);
    }
    let subject = Subject::plain().built();
    let plan = subject.bundle.dir().join("engines/tensorrt-11.4.0/decoder.plan");
    let text = std::fs::read_to_string(&plan).unwrap();
    std::fs::write(&plan, "nothing").unwrap();
    let record = plan.with_file_name("engines.json");
    let hashes = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, hashes.replace(&sha256(text.as_bytes()), &sha256(b"nothing"))).unwrap();
    let error = read(&mut machine.engines_of_nvidia(&subject.bundle, &headers), 4).unwrap_err();
    assert_eq!(error, "graph 'decoder': a plan of another library");
}

/// What a bundle computes of the ids `0..count`, or why not.
fn read(engines: &mut Engines<'_>, count: u32) -> Result<Tensor, String> {
    let ids: Vec<u32> = (0..count).map(|id| id % 32).collect();
    let mut sequence = Sequence::new(engines, ids.len()).unwrap();
    sequence.forward(engines, &ids, 1).map_err(|error| error.to_string())
}

#[test]
#[ignore = "needs a C++ compiler"]
fn a_prompt_that_is_too_long_says_which_flag_of_build_to_raise() {
    let machine = Machine::open();
    let subject = Subject::plain();
    let lengths = PromptLengths { prefix: 0, context: 20, suffix: 0 };
    build(&subject.bundle, Build { workload: workload(lengths), taps: false, any_length: false });
    let mut engines = machine.growing(&subject.bundle);
    assert!(read(&mut engines, 20).is_ok());
    let error = read(&mut engines, 21).unwrap_err();
    let expected = "graph 'decoder': dimension 1 (sequence) of input 'input_ids' is 21, and the engine was built for 1 to 20: \
                    build it anew, with more of --context (--force)";
    assert_eq!(error, expected);
    let mut sequence = Sequence::new(&engines, 0).unwrap();
    for id in 0..37 {
        sequence.forward(&mut engines, &[id % 32], 1).unwrap();
    }
    let error = sequence.forward(&mut engines, &[1], 1).unwrap_err().to_string();
    assert!(
        error.contains("(past) of input 'past_key_values.0.key' is 37, and the engine was built for 0 to 36"),
        "{error}"
    );
    assert!(error.contains("--context or --new-tokens"), "{error}");
}

#[test]
#[ignore = "needs a C++ compiler"]
fn only_what_was_built_is_run() {
    let machine = Machine::open();
    let options = ExecutionOptions::default();
    let trusted = ExecutionOptions { trusted: true, ..ExecutionOptions::default() };
    let refused = |bundle: &Bundle, options: &ExecutionOptions| {
        machine.loader(bundle, options).map(drop).unwrap_err().to_string()
    };
    let subject = Subject::plain();
    let error = refused(&subject.bundle, &options);
    assert!(error.contains("no engines of TensorRT 11.4.0") && error.contains("--runtime tensorrt"), "{error}");

    let subject = subject.built();
    let engines = |options| Engines::new(&subject.bundle, Box::new(machine.loader(&subject.bundle, options).unwrap()));
    let folder = subject.bundle.dir().join("engines/tensorrt-11.4.0");
    let error =
        Sequence::new(&engines(&options), 4).unwrap().forward_tapped(&mut engines(&options), &[1], 1, &["nothing"]);
    assert!(error.unwrap_err().to_string().contains("no output 'nothing': accordion build --taps"));

    // Another engine, which does what it does; and what is none.
    let plan = folder.join("decoder.plan");
    let text = std::fs::read_to_string(&plan).unwrap();
    std::fs::write(&plan, format!("{text}\n")).unwrap();
    let error = read(&mut engines(&options), 4).unwrap_err();
    assert!(
        error.contains("decoder.plan is not the engine that was built here") && error.contains("--trust"),
        "{error}"
    );
    assert!(read(&mut engines(&trusted), 4).is_ok());
    std::fs::write(&plan, "nothing").unwrap();
    assert_eq!(read(&mut engines(&trusted), 4).unwrap_err(), "graph 'decoder': a plan of another library");
    std::fs::remove_file(&plan).unwrap();
    assert!(read(&mut engines(&trusted), 4).unwrap_err().contains("decoder.plan"));

    // Engines with plugins.
    let record = folder.join("engines.json");
    let text = std::fs::read_to_string(&record).unwrap();
    let with_plugins = text.replacen("\"engines\"", "\"plugins_sha256\": \"0\", \"engines\"", 1);
    std::fs::write(&record, with_plugins).unwrap();
    assert!(refused(&subject.bundle, &options).contains("--plugins"));
    let library = subject.folder.path().join("libaccordion_plugins.so");
    std::fs::write(&library, "plugins").unwrap();
    let plugins = ExecutionOptions { plugins: Some(library), ..ExecutionOptions::default() };
    assert!(refused(&subject.bundle, &plugins).contains("libaccordion_plugins.so"));
    assert!(machine.loader(&subject.bundle, &ExecutionOptions { trusted: true, ..plugins }).is_ok());

    // Engines of other graphs.
    let hash = &subject.bundle.manifest().graphs["decoder"].sha256;
    std::fs::write(&record, text.replace(hash, "another")).unwrap();
    assert!(refused(&subject.bundle, &trusted).contains("built from another graph"));
}

/// A command on a bundle, with these libraries in the linker's path.
fn accordion(arguments: &[&str], libraries: &[&Path], cache: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    let folders = libraries.iter().map(|library| library.parent().unwrap());
    command.env("LD_LIBRARY_PATH", std::env::join_paths(folders).unwrap()).env("ACCORDION_CACHE", cache);
    command.args(arguments).env("RUST_BACKTRACE", "0").output().unwrap()
}

fn refusal(output: &Output) -> String {
    let message = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty() && message.contains("error: ") && !message.contains("panicked"), "{message}");
    message
}

/// The program says what is missing: the driver, NVIDIA's package, the engines.
#[test]
#[ignore = "needs a C++ compiler"]
fn the_program_says_what_is_missing() {
    let subject = Subject::plain();
    let [bundle, cache] = [subject.bundle.dir(), &subject.folder.path().join("cache")];
    let dir = bundle.to_str().unwrap();
    let verify = ["verify", dir, "--context", "16", "--engine", "tensorrt"];
    let profile = ["profile", dir, "--context", "16", "--engine", "tensorrt-rtx"];
    for arguments in [&verify[..], &profile] {
        let message = refusal(&accordion(arguments, &[], cache));
        assert!(message.contains("no NVIDIA driver library") && message.contains("nvidia.com"), "{message}");
    }
    let message = refusal(&accordion(&verify, &[driver()], cache));
    assert!(message.contains("libnvinfer.so.11") && message.contains("TENSORRT_ROOT"), "{message}");

    // Libraries and headers that are there, and a compiler that gives the double.
    let root = subject.folder.path().join("package");
    std::fs::create_dir_all(root.join("include")).unwrap();
    let headers = ["NvInfer.h", "NvOnnxParser.h", "NvInferRuntime.h", "NvInferVersion.h"];
    for name in headers
        .map(|name| format!("include/{name}"))
        .iter()
        .map(String::as_str)
        .chain(["libnvinfer.so.11", "libnvonnxparser.so.11"])
    {
        std::fs::write(root.join(name), "").unwrap();
    }
    let compiler = root.join("c++");
    let script = format!("#!/bin/sh\ncp '{}' libaccordion_shim.so\n", shim().display());
    std::fs::write(&compiler, script).unwrap();
    std::fs::set_permissions(&compiler, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let verify = [&verify[..], &["--root", root.to_str().unwrap()]].concat();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
        command.env("LD_LIBRARY_PATH", driver().parent().unwrap()).env("ACCORDION_CACHE", cache).env("CXX", &compiler);
        refusal(&command.args(arguments).output().unwrap())
    };
    let message = run(&verify);
    assert!(message.contains("there are no engines of TensorRT 11.4.0"), "{message}");
    subject.build();
    std::fs::write(subject.bundle.dir().join("engines/tensorrt-11.4.0/decoder.plan"), "nothing").unwrap();
    assert!(run(&verify).contains("decoder.plan is not the engine that was built here"));
    let message = run(&[&verify[..], &["--trust"]].concat());
    assert!(message.contains("graph 'decoder': a plan of another library"), "{message}");
    assert!(run(&["verify", dir, "--trust"]).contains("--trust is for --engine tensorrt"));
}
