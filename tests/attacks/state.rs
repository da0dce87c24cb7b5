//! Context states that lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::sparse;
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::pipeline::ContextState;
use accordion::pipeline::state_file::{METADATA_KEY, Origin, SavedState, StateMethod};
use accordion::precision::Recipe;
use accordion::tensor::Tensor;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use tempfile::TempDir;

const ROWS: usize = 5;

/// A bundle, and an honest state of five tokens for it, to be spoiled.
struct Victim {
    dir: TempDir,
    bundle: Bundle,
}

impl Victim {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = dir.path().join("checkpoint");
        fs::create_dir(&checkpoint).unwrap();
        sparse::write(&checkpoint, &sparse::tiny_model(), "F32", 1);
        let out = dir.path().join("bundle");
        let options = ExportOptions {
            method: MethodSettings::Plain,
            target: Target::OrtCpu,
            weights: WeightStorage::Link,
            recipe: Recipe::fp32(),
            force: false,
        };
        export(&Checkpoint::open(checkpoint).unwrap(), &out, &options).unwrap();
        let victim = Self { bundle: Bundle::open(out).unwrap(), dir };
        victim.honest().save(&victim.path()).unwrap();
        ContextState::load(&victim.path(), &victim.bundle).unwrap();
        victim
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("state.safetensors")
    }

    fn honest(&self) -> SavedState {
        let arch = self.bundle.architecture();
        let shape = [1, arch.num_kv_heads(), ROWS, arch.head_dim()];
        let zeros = || Tensor::from_f32(shape, vec![0.0; shape.iter().product()]).unwrap();
        let state = ContextState {
            cache: (0..arch.num_layers()).map(|_| [zeros(), zeros()]).collect(),
            position_ids: (0..ROWS as i64).collect(),
            last_position: ROWS as i64 - 1,
            logits: vec![0.0; arch.vocab_size()],
            injected: None,
            scales: None,
        };
        let lengths = PromptLengths { prefix: 1, context: 2, suffix: 2 };
        let origin = Origin::new(&self.bundle, StateMethod::Plain, "text", lengths);
        SavedState { state, prefix_ids: vec![1], suffix_ids: vec![2, 3], origin }
    }

    /// Refused with a message that names the file and has all these words.
    fn refused(&self, words: &[&str]) {
        let message = match ContextState::load(&self.path(), &self.bundle) {
            Ok(_) => panic!("it was loaded; expected a refusal with {words:?}"),
            Err(error) => error.to_string(),
        };
        for word in [&["state.safetensors"], words].concat() {
            assert!(message.contains(word), "{message}: expected {word:?}");
        }
    }

    /// With another header over the same data.
    fn with_header(edit: impl FnOnce(&mut Value)) -> Self {
        let victim = Self::new();
        let bytes = fs::read(victim.path()).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
        edit(&mut header);
        let header = header.to_string();
        let written = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[end..]].concat();
        fs::write(victim.path(), written).unwrap();
        victim
    }

    /// With another metadata entry.
    fn with_entry(edit: impl FnOnce(&mut Value)) -> Self {
        Self::with_header(|header| {
            let entry = &mut header["__metadata__"][METADATA_KEY];
            let mut value = serde_json::from_str(entry.as_str().unwrap()).unwrap();
            edit(&mut value);
            *entry = json!(value.to_string());
        })
    }

    /// Another state, saved as it is.
    fn with_state(edit: impl FnOnce(&mut SavedState)) -> Self {
        let victim = Self::new();
        let mut state = victim.honest();
        edit(&mut state);
        state.save(&victim.path()).unwrap();
        victim
    }
}

#[test]
fn files_that_are_no_states() {
    let victim = Victim::new();
    fs::remove_file(victim.path()).unwrap();
    victim.refused(&["No such file"]);
    for bytes in [&b""[..], b"1234567", &[0xff; 64], b"\x02\0\0\0\0\0\0\0{}"] {
        fs::write(victim.path(), bytes).unwrap();
        victim.refused(&[]);
    }
    // Weights are safetensors too.
    fs::copy(victim.dir.path().join("checkpoint/model.safetensors"), victim.path()).unwrap();
    victim.refused(&["not a context state"]);
    // A length that nothing backs is not allocated.
    fs::write(victim.path(), (1_u64 << 60).to_le_bytes()).unwrap();
    OpenOptions::new().write(true).open(victim.path()).unwrap().set_len(1 << 40).unwrap();
    victim.refused(&["claims"]);
}

#[test]
fn every_truncation_is_noticed() {
    let victim = Victim::new();
    let bytes = fs::read(victim.path()).unwrap();
    for len in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        fs::write(victim.path(), &bytes[..len]).unwrap();
        victim.refused(&[]);
    }
}

#[test]
fn entries_that_lie() {
    Victim::with_entry(|entry| entry["schema"] = json!("accordion.state/9")).refused(&["accordion.state/9", "state/1"]);
    Victim::with_entry(|entry| *entry = json!([])).refused(&[METADATA_KEY]);
    Victim::with_entry(|entry| drop(entry.as_object_mut().unwrap().remove("model"))).refused(&["model"]);
    Victim::with_entry(|entry| entry["method"] = json!({"name": "zip"})).refused(&["zip"]);
    Victim::with_entry(|entry| entry["lengths"]["prefix"] = json!(u64::MAX)).refused(&["1 ids of the prefix"]);
    Victim::with_entry(|entry| entry["lengths"]["suffix"] = json!(0)).refused(&["2 ids of the suffix"]);
    for last in [-1, 3, 5, i64::MAX] {
        Victim::with_entry(|entry| entry["last_position"] = json!(last)).refused(&["position_ids"]);
    }
    Victim::with_entry(|entry| entry["model"]["fingerprint"] = json!("other")).refused(&["the model", "other"]);
    Victim::with_entry(|entry| entry["model"]["rope"] = json!("theta 1")).refused(&["rotary embedding", "theta 1"]);
    Victim::with_entry(|entry| entry["precision"] = json!("int8")).refused(&["precision", "int8", "fp32"]);
    let rcc = json!({"name": "rcc", "window": 64, "ratio": 8, "pairs": false, "first_state_is_embedding": true});
    Victim::with_entry(|entry| entry["method"] = rcc).refused(&["the method", "rcc", "plain"]);
}

#[test]
fn tensors_that_lie() {
    let rename = |from: &'static str, to: &'static str| {
        Victim::with_header(|header| {
            let tensor = header.as_object_mut().unwrap().remove(from).unwrap();
            header[to] = tensor;
        })
    };
    rename("cache.0.key", "cache.9.key").refused(&["cache.0.key"]);
    rename("position_ids", "positions").refused(&["position_ids"]);
    rename("logits", "noise").refused(&["a suffix and logits"]);
    Victim::with_header(|header| header["cache.0.key"]["dtype"] = json!("I32")).refused(&["cache.0.key", "int32"]);
    Victim::with_header(|header| {
        let shape = header["cache.1.value"]["shape"].as_array_mut().unwrap();
        shape.swap(1, 2);
    })
    .refused(&["cache.1.value", "has shape"]);
    Victim::with_state(|saved| saved.prefix_ids = vec![u32::MAX]).refused(&["prefix_ids", "vocabulary"]);
    Victim::with_state(|saved| saved.state.position_ids[0] = -3).refused(&["position_ids"]);
    Victim::with_state(|saved| saved.state.position_ids[3] = 1).refused(&["position_ids"]);
    Victim::with_state(|saved| saved.suffix_ids = vec![1; 6]).refused(&["suffix"]);
    Victim::with_state(|saved| saved.state.logits = Vec::new()).refused(&["a suffix and logits"]);
    Victim::with_state(|saved| drop(saved.state.cache.pop())).refused(&["cache."]);
    Victim::with_state(|saved| saved.state.cache.push(saved.state.cache[0].clone())).refused(&["does not belong"]);
}

#[test]
fn a_state_that_cannot_be_written_leaves_nothing() {
    let victim = Victim::new();
    let before = fs::read(victim.path()).unwrap();
    let folder = victim.dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    // A folder cannot be replaced by a file.
    victim.honest().save(&folder).unwrap_err();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    victim.honest().save(&victim.dir.path().join("nowhere/state")).unwrap_err();
    let names: Vec<_> = fs::read_dir(victim.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(fs::read(victim.path()).unwrap(), before);
}

#[test]
fn scales_of_eight_bits_that_are_none() {
    use accordion::pipeline::state_precision::StatePrecision::Int8;
    let eight_bits = || Victim::with_state(|saved| saved.origin.stored_as = Int8);
    ContextState::load(&eight_bits().path(), &eight_bits().bundle).unwrap();
    // What the scales are is checked: the last tensor of the file that is one of 32 bits.
    for scale in [f32::NAN, 0.0, -1.0, f32::INFINITY] {
        let victim = eight_bits();
        let mut bytes = fs::read(victim.path()).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
        let begin = header["cache.0.key.scale"]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[end + begin..end + begin + 4].copy_from_slice(&scale.to_le_bytes());
        fs::write(victim.path(), bytes).unwrap();
        victim.refused(&["cache.0.key.scale", "not finite or not above 0"]);
    }
    Victim::with_entry(|entry| entry["stored_as"] = json!("int8")).refused(&["cache.0.key is fp32, expected int8"]);
    Victim::with_entry(|entry| entry["stored_as"] = json!("int3")).refused(&["int3"]);
}
