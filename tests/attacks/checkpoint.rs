//! Checkpoints that lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::float_cmp)]

use accordion::checkpoint::{Checkpoint, config_json, from_config_json, required_tensors};
use accordion_graphs::architecture::{Architecture, Llama};
use serde_json::{Map, Value, json};
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An honest little checkpoint, to be spoiled.
struct Victim {
    dir: TempDir,
}

fn tiny_config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 10, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    })
}

fn tiny_model() -> Llama {
    let Ok(Architecture::Llama(model)) = from_config_json(&tiny_config(), Path::new("")) else {
        panic!("an honest config")
    };
    model
}

/// Name, type, shape and bytes of every tensor, all ones.
fn tiny_tensors() -> Vec<(String, Vec<usize>)> {
    required_tensors(&tiny_model()).collect()
}

pub(crate) fn safetensors_header(tensors: &[(String, Vec<usize>)]) -> (Map<String, Value>, usize) {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
    }
    (header, end)
}

pub(crate) fn safetensors(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(std::iter::repeat_n(1.0_f32.to_le_bytes(), data_len.div_ceil(4)).flatten().take(data_len));
    bytes
}

impl Victim {
    fn single() -> Self {
        let victim = Self { dir: tempfile::tempdir().unwrap() };
        let (header, len) = safetensors_header(&tiny_tensors());
        victim.write("config.json", config_json(&tiny_model()).to_string());
        victim.write("model.safetensors", safetensors(&Value::from(header).to_string(), len));
        victim
    }

    fn sharded() -> Self {
        let victim = Self::single();
        std::fs::remove_file(victim.path("model.safetensors")).unwrap();
        let tensors = tiny_tensors();
        let (first, second) = tensors.split_at(9);
        let mut map = Map::new();
        for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
            let (header, len) = safetensors_header(tensors);
            victim.write(file, safetensors(&Value::from(header).to_string(), len));
            map.extend(tensors.iter().map(|(name, _)| (name.clone(), json!(file))));
        }
        victim.write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map}).to_string());
        victim
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Rewrites the header of model.safetensors, leaving the data as they are.
    fn with_header(self, change: impl FnOnce(&mut Value)) -> Self {
        let (header, len) = safetensors_header(&tiny_tensors());
        let mut header = Value::from(header);
        change(&mut header);
        self.write("model.safetensors", safetensors(&header.to_string(), len));
        self
    }

    fn with_index(self, change: impl FnOnce(&mut Value)) -> Self {
        let name = "model.safetensors.index.json";
        let mut index: Value = serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap();
        change(&mut index["weight_map"]);
        self.write(name, index.to_string());
        self
    }

    /// Opening must fail with a one-line message that contains all of `parts`.
    fn refused(&self, parts: &[&str]) {
        let message = Checkpoint::open(self.dir.path()).expect_err("must be refused").to_string();
        for part in parts {
            assert!(message.contains(part), "'{message}' does not say '{part}'");
        }
        assert!(!message.contains('\n'), "{message}");
    }
}

const NORM: &str = "model.norm.weight";

#[test]
fn the_honest_ones_open_and_agree() {
    let (single, sharded) = (Victim::single(), Victim::sharded());
    let single = Checkpoint::open(single.dir.path()).unwrap();
    let sharded = Checkpoint::open(sharded.dir.path()).unwrap();
    assert_eq!(sharded.weights().files().len(), 2);
    for (name, shape) in tiny_tensors() {
        for checkpoint in [&single, &sharded] {
            let tensor = checkpoint.tensor(&name).unwrap();
            assert_eq!(tensor.shape(), shape);
            assert!(tensor.to_f32().iter().all(|&x| x == 1.0));
        }
    }
    let missing = single.tensor("model.norm").unwrap_err().to_string();
    assert!(missing.contains("has no tensor model.norm"), "{missing}");
}

#[test]
fn the_fingerprint_tells_models_apart() {
    let victim = Victim::single();
    let fingerprint = || Checkpoint::open(victim.dir.path()).unwrap().fingerprint();
    let before = fingerprint();
    assert_eq!(before.len(), 64);
    assert_eq!(before, fingerprint());
    let mut bytes = std::fs::read(victim.path("model.safetensors")).unwrap();
    let last_tensor = bytes.len() - 4 * 10 * 8;
    bytes[last_tensor] ^= 1;
    victim.write("model.safetensors", bytes);
    let other_weights = fingerprint();
    assert_ne!(before, other_weights);
    let mut config = tiny_config();
    config["rope_theta"] = json!(5e5);
    victim.write("config.json", config.to_string());
    assert_ne!(other_weights, fingerprint());
}

#[test]
fn files_that_are_not_there() {
    let empty = Victim { dir: tempfile::tempdir().unwrap() };
    empty.refused(&["config.json", "No such file"]);
    empty.write("config.json", tiny_config().to_string());
    empty.refused(&["has neither model.safetensors nor model.safetensors.index.json"]);
    std::fs::create_dir(empty.path("model.safetensors")).unwrap();
    empty.refused(&["model.safetensors", "not a regular file"]);
}

#[test]
fn truncated_files() {
    let victim = Victim::single();
    let whole = std::fs::read(victim.path("model.safetensors")).unwrap();
    for keep in [0, 1, 7] {
        victim.write("model.safetensors", &whole[..keep]);
        victim.refused(&["model.safetensors", "too few"]);
    }
    for keep in [8, 9, 100] {
        victim.write("model.safetensors", &whole[..keep]);
        victim.refused(&["model.safetensors", "the header claims"]);
    }
    for missing in [1, 4, 100] {
        victim.write("model.safetensors", &whole[..whole.len() - missing]);
        victim.refused(&["model.safetensors", "ends at byte", "truncated?"]);
    }
}

#[test]
fn headers_that_claim_more_than_there_is() {
    let victim = Victim::single();
    let whole = std::fs::read(victim.path("model.safetensors")).unwrap();
    for claim in [u64::MAX, u64::MAX - 7, 1 << 62, whole.len() as u64, whole.len() as u64 - 7] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        victim.write("model.safetensors", bytes);
        victim.refused(&["model.safetensors", &format!("claims {claim} bytes")]);
    }
    // A sparse file is as large as it says without holding anything.
    victim.write("model.safetensors", (1_u64 << 39).to_le_bytes());
    OpenOptions::new().write(true).open(victim.path("model.safetensors")).unwrap().set_len(1 << 40).unwrap();
    victim.refused(&["claims 549755813888 bytes", "at most 100000000"]);
}

#[test]
fn headers_that_are_not_json() {
    for header in ["", "{", "[]", "null", "{\"a\":1}", "\u{0}", "{\"__metadata__\":{\"a\":{}}}"] {
        let victim = Victim::single();
        victim.write("model.safetensors", safetensors(header, 0));
        victim.refused(&["model.safetensors", "the header is not valid"]);
    }
    let victim = Victim::single();
    let deep = "[".repeat(100_000);
    victim.write("model.safetensors", safetensors(&format!("{{\"a\":{deep}"), 0));
    victim.refused(&["the header is not valid"]);
    let mut latin1 = safetensors("{\"a\":1}", 0);
    latin1[10] = 0xE9;
    victim.write("model.safetensors", latin1);
    victim.refused(&["the header is not valid"]);
}

#[test]
fn tensors_that_overlap_leave_holes_or_run_over() {
    let offsets = |range: [i64; 2]| move |header: &mut Value| header[NORM]["data_offsets"] = json!(range);
    let begin = safetensors_header(&tiny_tensors()).0[NORM]["data_offsets"][0].as_i64().unwrap();
    let case = |range| Victim::single().with_header(offsets(range));
    case([begin - 4, begin + 28]).refused(&[NORM, "inside the previous tensor"]);
    case([0, 32]).refused(&["inside the previous tensor"]);
    case([begin + 4, begin + 36]).refused(&["belong to no tensor"]);
    case([begin, begin + 28]).refused(&[NORM, "needs 32 bytes"]);
    case([begin + 32, begin]).refused(&["model.safetensors"]);
    case([begin, i64::MAX]).refused(&[NORM, "needs 32 bytes"]);
    case([-1, 31]).refused(&["the header is not valid"]);
    let trailing = Victim::single();
    let mut bytes = std::fs::read(trailing.path("model.safetensors")).unwrap();
    bytes.extend([0; 12]);
    trailing.write("model.safetensors", bytes);
    trailing.refused(&["belong to no tensor"]);
}

#[test]
fn shapes_and_types_that_lie() {
    let change = |field: &'static str, value: Value| Victim::single().with_header(move |h| h[NORM][field] = value);
    change("shape", json!([1_u64 << 33, 1_u64 << 33])).refused(&[NORM, "overflows"]);
    change("shape", json!([u64::MAX])).refused(&[NORM, "overflows"]);
    change("shape", json!([-8])).refused(&["the header is not valid"]);
    change("shape", json!([1e3])).refused(&["the header is not valid"]);
    change("shape", json!([9])).refused(&[NORM, "needs 36 bytes"]);
    change("dtype", json!("F8_E5M2")).refused(&[NORM, "has type F8_E5M2; supported are"]);
    change("dtype", json!("F64")).refused(&[NORM, "has type F64"]);
    change("secret", json!(1)).refused(&["the header is not valid", "secret"]);
}

#[test]
fn a_name_twice() {
    let victim = Victim::single();
    let (header, len) = safetensors_header(&tiny_tensors());
    let text = Value::from(header).to_string();
    let twice = text.replacen("model.layers.0.mlp.up_proj.weight", NORM, 1);
    victim.write("model.safetensors", safetensors(&twice, len));
    victim.refused(&["tensor model.norm.weight appears twice"]);

    let victim = Victim::sharded();
    let index = std::fs::read_to_string(victim.path("model.safetensors.index.json")).unwrap();
    victim.write("model.safetensors.index.json", index.replacen("model.layers.0.mlp.up_proj.weight", NORM, 1));
    victim.refused(&["model.safetensors.index.json", "tensor model.norm.weight appears twice"]);
}

#[test]
fn shard_names_that_leave_the_folder() {
    let outside = Victim::sharded();
    let outside = outside.path("b.safetensors").display().to_string();
    for name in
        ["../b.safetensors", "..", "", ".", "sub/b.safetensors", "b.safetensors/", "..\\b", "C:b", outside.as_str()]
    {
        let victim = Victim::sharded().with_index(|map| map[NORM] = json!(name));
        victim.refused(&["model.safetensors.index.json", NORM, &format!("'{name}'"), "plain file name"]);
    }
}

#[test]
fn shards_that_are_missing_or_hold_something_else() {
    Victim::sharded().with_index(|map| map[NORM] = json!("c.safetensors")).refused(&[
        "model.safetensors.index.json",
        NORM,
        "'c.safetensors'",
        "does not exist",
    ]);
    Victim::sharded().with_index(|map| map[NORM] = json!("a.safetensors")).refused(&[
        "model.safetensors.index.json",
        NORM,
        "'a.safetensors'",
        "has no such tensor",
    ]);
    Victim::sharded().with_index(|map| *map = json!([])).refused(&["model.safetensors.index.json"]);
    Victim::sharded().with_index(|map| map[NORM] = json!(3)).refused(&["model.safetensors.index.json"]);
    Victim::sharded()
        .with_index(|map| drop(map.as_object_mut().unwrap().remove(NORM)))
        .refused(&["has no tensor", NORM]);
}

#[test]
fn tensors_that_the_architecture_does_not_expect() {
    let rename = |header: &mut Value| {
        let tensor = header.as_object_mut().unwrap().remove(NORM).unwrap();
        header["model.final_norm.weight"] = tensor;
    };
    Victim::single().with_header(rename).refused(&["has no tensor model.norm.weight"]);
    Victim::single()
        .with_header(|header| header[NORM]["shape"] = json!([2, 4]))
        .refused(&["tensor model.norm.weight", "has shape [2, 4], config.json asks for [8]"]);
    Victim::single()
        .with_header(|header| header[NORM]["dtype"] = json!("I32"))
        .refused(&["tensor model.norm.weight", "is int32, expected fp32, fp16 or bf16"]);
    let victim = Victim::single();
    let mut config = tiny_config();
    config["model_type"] = json!("qwen2");
    victim.write("config.json", config.to_string());
    victim.refused(&["has no tensor model.layers.0.self_attn.q_proj.bias"]);
}

#[test]
fn configs_that_lie() {
    let victim = Victim::single();
    for (field, value) in [
        ("num_hidden_layers", json!(1_u64 << 60)),
        ("num_hidden_layers", json!(-1)),
        ("num_attention_heads", json!(3)),
        ("num_key_value_heads", json!(0)),
        ("vocab_size", json!(u64::MAX)),
        ("head_dim", json!(3)),
        ("rms_norm_eps", json!(0)),
    ] {
        let mut config = config_json(&tiny_model());
        config[field] = value;
        victim.write("config.json", config.to_string());
        victim.refused(&["config.json", "expected"]);
    }
    for text in ["", "{", "\u{feff}{}", "[1]", "{\"rms_norm_eps\": NaN}", "{\"rope_theta\": 1e999}", "\"x\""] {
        victim.write("config.json", text);
        victim.refused(&["config.json"]);
    }
    victim.write("config.json", b"{\"model_type\": \"\xff\"}");
    victim.refused(&["config.json"]);
    victim.write("config.json", "[".repeat(1 << 20));
    victim.refused(&["config.json"]);
    OpenOptions::new().write(true).open(victim.path("config.json")).unwrap().set_len(1 << 40).unwrap();
    victim.refused(&["config.json has 1099511627776 bytes; at most"]);
}

#[test]
fn a_generation_config_that_lies() {
    let victim = Victim::single();
    victim.write("generation_config.json", "{\"eos_token_id\": [3, 5]}");
    let Architecture::Llama(model) = Checkpoint::open(victim.dir.path()).unwrap().architecture().clone() else {
        panic!("a Llama")
    };
    assert_eq!(model.eos_token_ids, [3, 5]);
    victim.write("generation_config.json", "{\"eos_token_id\": [3, 10]}");
    victim.refused(&["`eos_token_id` in", "generation_config.json is [3,10]", "below 10"]);
}
