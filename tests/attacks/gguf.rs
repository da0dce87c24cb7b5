//! GGUF and llama2.c files that lie: importing them must fail with a message and leave nothing behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::float_cmp)]

use accordion::checkpoint::{Checkpoint, import_gguf, import_llama2c};
use accordion_graphs::architecture::{Architecture, RopeScaling};
use proptest::prelude::*;
use std::path::PathBuf;
use tempfile::TempDir;

/// A metadata value.
#[derive(Clone)]
enum Field {
    U32(u32),
    U64(u64),
    F32(f32),
    Text(&'static str),
    Texts(Vec<String>),
    Numbers(Vec<i32>),
    /// Type number and bytes as they are.
    Raw(u32, Vec<u8>),
}

#[derive(Clone)]
struct Tensor {
    name: String,
    /// Innermost first.
    shape: Vec<u64>,
    kind: u32,
    offset: Option<u64>,
    data: Vec<u8>,
}

/// An honest little GGUF file, to be spoiled before it is written.
#[derive(Clone)]
struct File {
    version: u32,
    tensor_count: Option<u64>,
    field_count: Option<u64>,
    fields: Vec<(String, Field)>,
    tensors: Vec<Tensor>,
}

const ALIGNMENT: usize = 32;

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Field {
    fn write(&self, out: &mut Vec<u8>) {
        let mut tagged = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U32(n) => tagged(4, &n.to_le_bytes()),
            Self::U64(n) => tagged(10, &n.to_le_bytes()),
            Self::F32(x) => tagged(6, &x.to_le_bytes()),
            Self::Raw(kind, bytes) => tagged(*kind, bytes),
            Self::Text(value) => {
                tagged(8, &[]);
                text(out, value);
            }
            Self::Texts(values) => {
                tagged(9, &8_u32.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                for value in values {
                    text(out, value);
                }
            }
            Self::Numbers(values) => {
                tagged(9, &5_u32.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                out.extend(values.iter().flat_map(|n| n.to_le_bytes()));
            }
        }
    }
}

/// A byte-level vocabulary: a control token, the printable characters, and one merge.
fn vocabulary() -> Vec<String> {
    let letters = (b'!'..=b'~').map(|c| char::from(c).to_string());
    ["<|end|>".to_owned()].into_iter().chain(letters).chain(["\u{120}".to_owned(), "\u{120}a".to_owned()]).collect()
}

const VOCAB: u64 = 98;

/// Two heads of four rows, hidden width 8, one layer. Element `i` of a tensor is `i`.
fn honest() -> File {
    let tokens = vocabulary();
    let mut kinds = vec![1; tokens.len()];
    kinds[0] = 3;
    let fields = [
        ("general.architecture", Field::Text("llama")),
        ("llama.block_count", Field::U32(1)),
        ("llama.context_length", Field::U64(64)),
        ("llama.embedding_length", Field::U32(8)),
        ("llama.feed_forward_length", Field::U32(12)),
        ("llama.attention.head_count", Field::U32(2)),
        ("llama.attention.head_count_kv", Field::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Field::F32(1e-5)),
        ("llama.rope.freq_base", Field::F32(5e5)),
        ("tokenizer.ggml.model", Field::Text("gpt2")),
        ("tokenizer.ggml.pre", Field::Text("smollm")),
        ("tokenizer.ggml.tokens", Field::Texts(tokens)),
        ("tokenizer.ggml.token_type", Field::Numbers(kinds)),
        ("tokenizer.ggml.merges", Field::Texts(vec!["\u{120} a".to_owned()])),
        ("tokenizer.ggml.eos_token_id", Field::U32(0)),
    ];
    let shapes: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[8, VOCAB]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[8, 4]),
        ("blk.0.attn_v.weight", &[8, 4]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_gate.weight", &[8, 12]),
        ("blk.0.ffn_up.weight", &[8, 12]),
        ("blk.0.ffn_down.weight", &[12, 8]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("output_norm.weight", &[8]),
    ];
    let tensor = |(name, shape): (&str, &[u64])| {
        let elements = shape.iter().product::<u64>();
        let data = (0..elements).flat_map(|i| (i as f32).to_le_bytes()).collect();
        Tensor { name: name.to_owned(), shape: shape.to_vec(), kind: 0, offset: None, data }
    };
    File {
        version: 3,
        tensor_count: None,
        field_count: None,
        fields: fields.map(|(key, field)| (key.to_owned(), field)).to_vec(),
        tensors: shapes.map(tensor).to_vec(),
    }
}

impl File {
    fn set(mut self, key: &str, field: Field) -> Self {
        self.fields.retain(|(name, _)| name != key);
        self.fields.push((key.to_owned(), field));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.fields.retain(|(name, _)| name != key);
        self
    }

    fn tensor(mut self, name: &str, change: impl FnOnce(&mut Tensor)) -> Self {
        change(self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.field_count.unwrap_or(self.fields.len() as u64).to_le_bytes());
        for (key, field) in &self.fields {
            text(&mut out, key);
            field.write(&mut out);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            out.extend(tensor.shape.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.append(&mut data);
        out
    }
}

/// A folder with the file to import, and the goal beside it.
struct Attempt {
    dir: TempDir,
}

impl Attempt {
    fn of(bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.bin"), bytes).unwrap();
        Self { dir }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("model.bin")
    }

    fn goal(&self) -> PathBuf {
        self.dir.path().join("goal")
    }

    fn nothing_left_behind(&self) {
        let names: Vec<_> = self.dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["model.bin"]);
    }
}

fn refused(bytes: &[u8], parts: &[&str]) {
    let attempt = Attempt::of(bytes);
    let message = import_gguf(&attempt.source(), &attempt.goal(), |_, _| {}).expect_err("must be refused").to_string();
    for part in parts.iter().chain(&["model.bin"]) {
        assert!(message.contains(part), "'{message}' does not say '{part}'");
    }
    attempt.nothing_left_behind();
}

#[test]
fn the_honest_one_becomes_a_checkpoint() {
    let attempt = Attempt::of(&honest().bytes());
    let mut last = (0, 0);
    import_gguf(&attempt.source(), &attempt.goal(), |done, all| last = (done, all)).unwrap();
    let checkpoint = Checkpoint::open(attempt.goal()).unwrap();
    assert_eq!(last, (checkpoint.weights().parameter_count(), checkpoint.weights().parameter_count()));
    let Architecture::Llama(model) = checkpoint.architecture() else { panic!("a Llama") };
    assert_eq!((model.rms_norm_eps, model.rope.theta, model.tie_word_embeddings), (1e-5, 5e5, true));
    assert_eq!(model.eos_token_ids, [0]);

    let first_of_rows = |name: &str| -> Vec<f32> {
        checkpoint.tensor(name).unwrap().as_f32().unwrap().iter().step_by(8).map(|x| x / 8.0).collect()
    };
    // Rows of each head: the even ones of the file, then the odd ones. Other tensors keep their order.
    assert_eq!(first_of_rows("model.layers.0.self_attn.q_proj.weight"), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(first_of_rows("model.layers.0.self_attn.k_proj.weight"), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(first_of_rows("model.layers.0.self_attn.v_proj.weight"), [0.0, 1.0, 2.0, 3.0]);
    let offset = checkpoint.weights().get("model.embed_tokens.weight").unwrap().offset;
    assert_eq!(offset % 64, 0);

    let tokenizer = checkpoint.tokenizer().unwrap();
    let ids = tokenizer.encode("b a12<|end|>", true).unwrap();
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
    assert_eq!(pieces, ["b", "\u{120}a", "1", "2", "<|end|>"]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "b a12");
    assert_eq!(tokenizer.eos_token(), Some("<|end|>"));
}

#[test]
fn nothing_is_overwritten() {
    let attempt = Attempt::of(&honest().bytes());
    std::fs::create_dir(attempt.goal()).unwrap();
    let message = import_gguf(&attempt.source(), &attempt.goal(), |_, _| {}).unwrap_err().to_string();
    assert!(message.contains("goal exists already"), "{message}");
    assert_eq!(attempt.goal().read_dir().unwrap().count(), 0);
    let nowhere = attempt.dir.path().join("no/such/folder");
    let message = import_gguf(&attempt.source(), &nowhere, |_, _| {}).unwrap_err().to_string();
    assert!(message.contains("no/such"), "{message}");
}

#[test]
fn rotary_scaling_and_versions() {
    let linear = File { version: 2, ..honest() }
        .set("llama.rope.scaling.type", Field::Text("linear"))
        .set("llama.rope.scaling.factor", Field::F32(4.0));
    let attempt = Attempt::of(&linear.bytes());
    import_gguf(&attempt.source(), &attempt.goal(), |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(attempt.goal()).unwrap();
    let Architecture::Llama(model) = checkpoint.architecture() else { panic!("a Llama") };
    assert_eq!(model.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    refused(&linear.set("llama.rope.scaling.type", Field::Text("foo")).bytes(), &["'foo'", "linear, dynamic, yarn"]);
    refused(
        &honest().set("llama.rope.scaling.attn_factor", Field::F32(1.0)).bytes(),
        &["'llama.rope.scaling.attn_factor'"],
    );
}

#[test]
fn structures_that_lie() {
    refused(b"", &["not a GGUF file"]);
    refused(b"GGML", &["not a GGUF file"]);
    refused(b"GGUF", &["ends inside the header"]);
    refused(&File { version: 1, ..honest() }.bytes(), &["version 1"]);
    refused(&File { version: 0x0300_0000, ..honest() }.bytes(), &["GGUF version"]);
    refused(&File { tensor_count: Some(u64::MAX), ..honest() }.bytes(), &["18446744073709551615 tensors"]);
    refused(&File { field_count: Some(1 << 60), ..honest() }.bytes(), &["metadata fields; at most"]);
    refused(&File { tensor_count: Some(12), ..honest() }.bytes(), &["which is not supported"]);
    let whole = honest().bytes();
    for len in (0..whole.len()).step_by(97) {
        refused(&whole[..len], &[]);
    }
    let huge_text = Field::Raw(8, u64::MAX.to_le_bytes().to_vec());
    refused(&honest().set("general.name", huge_text).bytes(), &["ends inside general.name"]);
    let array = |kind: u32, len: u64| Field::Raw(9, [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    refused(&honest().set("x", array(0, u64::MAX)).bytes(), &["array elements; at most"]);
    refused(&honest().set("x", array(12, 1 << 20)).bytes(), &["ends inside x"]);
    refused(&honest().set("x", array(9, 1)).bytes(), &["x has type 9"]);
    refused(&honest().set("x", Field::Raw(77, vec![])).bytes(), &["x has type 77"]);
    let not_utf8 = Field::Raw(8, [&1_u64.to_le_bytes()[..], &[0xFF]].concat());
    refused(&honest().set("x", not_utf8).bytes(), &["x is not UTF-8"]);
    let mut twice = honest();
    twice.fields.push(twice.fields[0].clone());
    refused(&twice.bytes(), &["general.architecture appears twice"]);
    for alignment in [0, 3, 1 << 20] {
        refused(&honest().set("general.alignment", Field::U32(alignment)).bytes(), &["general.alignment is"]);
    }
}

#[test]
fn tensors_that_lie() {
    let q = "blk.0.attn_q.weight";
    let spoiled = |change: fn(&mut Tensor), parts: &[&str]| refused(&honest().tensor(q, change).bytes(), parts);
    spoiled(|t| t.shape = vec![u64::MAX, 2], &[q, "does not divide"]);
    spoiled(|t| t.shape = vec![1 << 40, 1 << 20], &[q, "of the tensor data, which has"]);
    spoiled(|t| t.shape = vec![], &[q, "does not divide"]);
    spoiled(|t| t.shape = vec![0, 8], &[q, "does not divide"]);
    spoiled(|t| t.shape = vec![1; 5], &["5 dimensions; at most 4"]);
    spoiled(|t| t.shape = vec![4, 8], &[q, "has shape [8, 4], config.json asks for [8, 8]"]);
    spoiled(|t| t.kind = 8, &[q, "blocks of 32"]);
    spoiled(|t| t.kind = 99, &[q, "type 99"]);
    spoiled(|t| t.offset = Some(u64::MAX - 31), &[q, "of the tensor data"]);
    spoiled(|t| t.offset = Some(1), &[q, "at 1 of the tensor data"]);
    spoiled(|t| t.offset = Some(0), &["overlap"]);
    spoiled(|t| t.name = "blk.0.attn_k.weight".to_owned(), &["tensor blk.0.attn_k.weight appears twice"]);
    spoiled(|t| t.name = "blk.0.attn_qkv.weight".to_owned(), &["has no tensor blk.0.attn_q.weight"]);
    let mut extra = honest();
    extra.tensors.push(Tensor { name: "rope_freqs.weight".to_owned(), ..extra.tensors[10].clone() });
    refused(&extra.bytes(), &["tensor 'rope_freqs.weight'", "not supported"]);
}

#[test]
fn metadata_that_lie() {
    let with = |key: &str, field: Field| honest().set(key, field).bytes();
    refused(&honest().without("general.architecture").bytes(), &["`general.architecture` is missing"]);
    refused(&with("general.architecture", Field::Text("mamba")), &["general.architecture 'mamba'", "llama, qwen2"]);
    refused(&honest().without("llama.block_count").bytes(), &["`llama.block_count` is missing"]);
    refused(&with("llama.block_count", Field::U64(1 << 60)), &["`num_hidden_layers`", "1 to 1024"]);
    refused(&with("llama.attention.head_count", Field::U32(0)), &["`num_attention_heads`"]);
    refused(&with("llama.attention.head_count_kv", Field::U32(3)), &["`num_key_value_heads`"]);
    refused(&with("llama.attention.layer_norm_rms_epsilon", Field::F32(f32::NAN)), &["`rms_norm_eps`", "NaN"]);
    refused(&with("llama.rope.freq_base", Field::F32(f32::INFINITY)), &["`rope_theta`", "inf"]);
    refused(&with("llama.rope.dimension_count", Field::U32(3)), &["`head_dim`"]);
    refused(
        &honest()
            .set("llama.rope.dimension_count", Field::U32(4))
            .set("llama.attention.key_length", Field::U32(8))
            .bytes(),
        &["`llama.rope.dimension_count`", "heads of one width"],
    );
    refused(&with("llama.expert_count", Field::U32(8)), &["mixtures of experts"]);
}

#[test]
fn vocabularies_that_lie() {
    let with = |key: &str, field: Field| honest().set(key, field).bytes();
    let mut tokens = vocabulary();
    refused(&with("tokenizer.ggml.model", Field::Text("rwkv")), &["tokenizer.ggml.model 'rwkv'", "gpt2, llama"]);
    refused(&with("tokenizer.ggml.pre", Field::Text("tekken")), &["tokenizer.ggml.pre 'tekken'", "smollm"]);
    refused(&honest().without("tokenizer.ggml.tokens").bytes(), &["`tokenizer.ggml.tokens` is missing"]);
    refused(&with("tokenizer.ggml.tokens", Field::U32(1)), &["`tokenizer.ggml.tokens` is missing"]);
    refused(&with("tokenizer.ggml.token_type", Field::Numbers(vec![1])), &["an array of 1, expected 97"]);
    refused(&with("tokenizer.ggml.merges", Field::Texts(vec!["ab".to_owned()])), &["`tokenizer.ggml.merges`"]);
    refused(&with("tokenizer.ggml.merges", Field::Texts(vec!["a b".to_owned()])), &["'a', 'b' and their merge"]);
    refused(&with("tokenizer.ggml.eos_token_id", Field::U32(98)), &["`eos_token_id`", "below 98"]);
    refused(
        &with("tokenizer.ggml.padding_token_id", Field::U32(97)),
        &["`tokenizer.ggml.padding_token_id` in", "below 97"],
    );
    tokens[1] = tokens[2].clone();
    refused(&with("tokenizer.ggml.tokens", Field::Texts(tokens.clone())), &["1 and 2 are both"]);
    tokens.extend(["x1", "x2"].map(String::from));
    refused(&with("tokenizer.ggml.tokens", Field::Texts(tokens)), &["an array of 99, expected at most 98"]);
    let mut long = vocabulary();
    long[5] = "a".repeat(2000);
    let long =
        honest().set("tokenizer.ggml.model", Field::Text("llama")).set("tokenizer.ggml.tokens", Field::Texts(long));
    refused(&long.bytes(), &["no piece of more than 1024 bytes"]);
}

/// A llama2.c model of width 4 with two heads, and its tokenizer.
fn llama2c(header: [i32; 7]) -> Vec<u8> {
    let mut out: Vec<u8> = header.iter().flat_map(|n| n.to_le_bytes()).collect();
    let floats = 260 * 4 + (4 + 4 * 16 + 4 + 3 * 24) + 4 + 8 * 2;
    out.extend((0..floats).flat_map(|i| (i as f32).to_le_bytes()));
    out.extend(4_i32.to_le_bytes());
    for id in 0..260_usize {
        let piece = match id {
            259 => b" ".to_vec(),
            id => vec![id as u8; 1],
        };
        out.extend((-(id as f32)).to_le_bytes());
        out.extend((piece.len() as i32).to_le_bytes());
        out.extend(piece);
    }
    out
}

const HONEST_HEADER: [i32; 7] = [4, 6, 1, 2, 2, 260, 8];

#[test]
fn llama2c_honest_and_not() {
    let whole = llama2c(HONEST_HEADER);
    let attempt = Attempt::of(&whole);
    import_llama2c(&attempt.source(), &attempt.goal(), |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(attempt.goal()).unwrap();
    let first = |name: &str| checkpoint.tensor(name).unwrap().as_f32().unwrap()[0];
    assert_eq!(first("model.layers.0.input_layernorm.weight"), 1040.0);
    assert_eq!(first("model.layers.0.mlp.up_proj.weight"), 1040.0 + 4.0 + 64.0 + 4.0 + 48.0);
    let tokenizer = checkpoint.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("A", true).unwrap(), [1, 259, 3 + 65]);
    assert_eq!(tokenizer.decode(&[1, 259, 3 + 65], true).unwrap(), "A");

    let refused = |bytes: &[u8], part: &str| {
        let attempt = Attempt::of(bytes);
        let message = import_llama2c(&attempt.source(), &attempt.goal(), |_, _| {}).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("model.bin"), "'{message}' does not say '{part}'");
        attempt.nothing_left_behind();
    };
    refused(&[], "the header needs 28");
    refused(&whole[..27], "the header needs 28");
    refused(&whole[..1000], "the model needs");
    refused(&whole[..whole.len() - 1], "the tokenizer after the model");
    let header = |at: usize, value: i32| {
        let mut header = HONEST_HEADER;
        header[at] = value;
        llama2c(header)
    };
    refused(&header(0, -4), "`hidden_size`");
    refused(&header(2, i32::MAX), "`num_hidden_layers`");
    refused(&header(3, 3), "heads");
    refused(&header(5, i32::MIN), "`vocab_size`");
    refused(&header(6, 1 << 30), "the model needs");
}

proptest! {
    #[test]
    fn spoiled_bytes_are_imported_or_refused(
        edits in proptest::collection::vec((0..4200_usize, any::<u8>()), 1..6),
    ) {
        let mut bytes = honest().bytes();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        let attempt = Attempt::of(&bytes);
        match import_gguf(&attempt.source(), &attempt.goal(), |_, _| {}) {
            // Whatever was let through has to be a checkpoint.
            Ok(()) => drop(Checkpoint::open(attempt.goal()).unwrap().tokenizer().unwrap().encode("a b", true)),
            Err(_) => attempt.nothing_left_behind(),
        }
    }
}
