//! A checkpoint of a few kilobytes with random weights, whose tokens are the characters of ASCII, and its bundles.

use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::{Checkpoint, RCC_FILE, config_json, rcc_json};
use accordion::goldens::{HomerCase, RccCase};
use accordion::precision::Recipe;
use accordion_graphs::architecture::{Architecture, Llama};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::HomerSettings;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Chunks of 40 tokens: longer contexts are pruned.
pub(crate) const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 40, max_initial_chunk_len: None, target_len: 40, layers_warmup: 2 };

/// Long enough for four leaves.
pub(crate) const LONG: &str =
    "A grey heron stood in the reeds until noon, and nobody in the village could say what it was.";

/// Short enough for one leaf that keeps everything.
pub(crate) const SHORT: &str = "The quick brown fox.";

/// A folder with a checkpoint and its bundles.
pub(crate) struct Tiny {
    dir: TempDir,
}

impl Tiny {
    /// The model as it is in the golden case E.
    pub(crate) fn new() -> Self {
        Self::with(|_| {}, None)
    }

    /// The model with changes to its architecture, and a chat template.
    pub(crate) fn with(change: impl FnOnce(&mut Llama), template: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/homer/homer_E.json");
        let case = HomerCase::open(&golden).unwrap();
        let mut arch = case.architecture.clone();
        arch.eos_token_ids.clear();
        change(&mut arch);
        let tiny = Self { dir };
        let checkpoint = tiny.checkpoint();
        std::fs::create_dir(&checkpoint).unwrap();
        std::fs::copy(case.weights_path(), checkpoint.join("model.safetensors")).unwrap();
        std::fs::write(checkpoint.join("config.json"), config_json(&arch).to_string()).unwrap();
        std::fs::write(checkpoint.join("tokenizer.json"), tokenizer(arch.vocab_size).to_string()).unwrap();
        let config = json!({"chat_template": template});
        std::fs::write(checkpoint.join("tokenizer_config.json"), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(checkpoint).unwrap();
        let tree_heights = tree_heights(arch.num_layers, SETTINGS, LONG.len().max(150)).unwrap();
        let methods = [
            ("homer", MethodSettings::Homer { settings: SETTINGS, tree_heights, significance: None }),
            ("plain", MethodSettings::Plain),
        ];
        for (name, method) in methods {
            let options = ExportOptions {
                method,
                target: Target::OrtCpu,
                weights: WeightStorage::Link,
                recipe: Recipe::fp32(),
                force: false,
            };
            export(&checkpoint, &tiny.path(name), &options).unwrap();
        }
        std::fs::write(tiny.path("long.txt"), LONG).unwrap();
        std::fs::write(tiny.path("short.txt"), SHORT).unwrap();
        tiny
    }

    /// The Qwen2 variant of RCC as it is in its golden case, with changes to its decoder: segments of 64 tokens, 8 to a
    /// slot.
    pub(crate) fn rcc(change: impl FnOnce(&mut Llama)) -> Self {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rcc/qwen2_r8.config.json");
        let case = RccCase::open(&golden).unwrap();
        let Architecture::Llama(mut arch) = case.decoder.clone() else { panic!("{:?}", case.decoder) };
        arch.eos_token_ids.clear();
        change(&mut arch);
        let tiny = Self { dir: tempfile::tempdir().unwrap() };
        let checkpoint = tiny.checkpoint();
        std::fs::create_dir(&checkpoint).unwrap();
        std::fs::copy(case.weights_path(), checkpoint.join("model.safetensors")).unwrap();
        std::fs::write(checkpoint.join("config.json"), config_json(&arch).to_string()).unwrap();
        std::fs::write(checkpoint.join(RCC_FILE), rcc_json(&case.model.encoder, case.settings).to_string()).unwrap();
        std::fs::write(checkpoint.join("tokenizer.json"), tokenizer(arch.vocab_size).to_string()).unwrap();
        tiny.succeed(&["export", "rcc", "checkpoint", "rcc"]);
        std::fs::write(tiny.path("long.txt"), LONG).unwrap();
        std::fs::write(tiny.path("short.txt"), SHORT).unwrap();
        tiny
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn checkpoint(&self) -> PathBuf {
        self.path("checkpoint")
    }

    /// Runs `accordion` in the folder, with `input` on standard input.
    pub(crate) fn accordion(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_accordion"))
            .args(arguments)
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that refuses its arguments may be gone before it reads.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// Standard output of a command that succeeds.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.accordion(arguments, b"");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The message of a command that cannot do what it is asked.
    pub(crate) fn refuse(&self, arguments: &[&str]) -> String {
        let output = self.accordion(arguments, b"");
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.starts_with("error: "), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?} printed a result");
        message
    }
}

/// Byte-level, without merges; the ids that ASCII leaves are Greek.
fn tokenizer(vocab_size: usize) -> Value {
    let ascii: Vec<char> = (' '..='~').map(|c| if c == ' ' { '\u{120}' } else { c }).chain(['\u{10a}']).collect();
    let greek: Vec<(usize, char)> = (ascii.len()..vocab_size).zip('\u{391}'..).collect();
    let vocab: serde_json::Map<_, _> =
        ascii.iter().chain(greek.iter().map(|(_, c)| c)).zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    let added: Vec<Value> = greek
        .iter()
        .map(|(id, c)| {
            json!({"id": id, "content": c, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": false})
        })
        .collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}
