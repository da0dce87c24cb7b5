//! Every switch of the Llama family, graphs against the reference on seeded random weights: grouped and single
//! key/value heads, a head width of its own, biases, tied embeddings, 16-bit weights, sharded files and all rotary
//! scalings, with positions beyond the trained range.

#![allow(clippy::unwrap_used, clippy::panic)]

mod synthetic;

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::pipeline::decode::Sequence;
use accordion::pipeline::{Engines, homer, plain};
use accordion::precision::Recipe;
use accordion::reference::llama::Llama as Reference;
use accordion::reference::{self, decode};
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::taps::NoTaps;
use accordion_graphs::architecture::{Llama, Rope, RopeScaling};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use synthetic::{Storage, small_llama, write_checkpoint};

const BOUND: f32 = 1e-4;

fn base() -> Llama {
    small_llama(4)
}

fn scaled(scaling: RopeScaling) -> Llama {
    Llama { rope: Rope { theta: 10_000.0, scaling }, ..base() }
}

fn variants() -> Vec<(&'static str, Llama, Storage)> {
    let single = |dtype| Storage { dtype, shards: 1 };
    let f32 = || single(DType::F32);
    vec![
        ("grouped heads", base(), f32()),
        ("one key/value head", Llama { num_kv_heads: 1, ..base() }, f32()),
        ("as many key/value heads", Llama { num_kv_heads: 4, ..base() }, f32()),
        ("head width of its own", Llama { head_dim: 24, ..base() }, f32()),
        ("qkv biases, tied", Llama { qkv_bias: true, tie_word_embeddings: true, ..base() }, f32()),
        ("all biases", Llama { qkv_bias: true, o_bias: true, mlp_bias: true, ..base() }, f32()),
        ("fp16 weights", base(), single(DType::F16)),
        ("bf16 weights, tied", Llama { tie_word_embeddings: true, ..base() }, single(DType::Bf16)),
        ("three shards", base(), Storage { dtype: DType::F32, shards: 3 }),
        ("linear", scaled(RopeScaling::Linear { factor: 4.0 }), f32()),
        ("dynamic", scaled(RopeScaling::Dynamic { factor: 4.0, original_max_positions: 24 }), f32()),
        (
            "yarn",
            scaled(RopeScaling::Yarn {
                factor: 4.0,
                original_max_positions: 24,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: 0.1 * 4.0_f64.ln() + 1.0,
            }),
            f32(),
        ),
        (
            "llama3",
            scaled(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_positions: 32,
            }),
            f32(),
        ),
    ]
}

/// Whether `found` is within the bound of `expected`, everywhere; else where it is not.
fn compare(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= BOUND, "{what}: {f} at {i}, expected {e}");
    }
}

#[test]
fn graphs_and_reference_agree_on_every_architecture() {
    for (name, arch, storage) in variants() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        write_checkpoint(&dir, &arch, &storage, 7);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let model = Reference::load(&arch, |tensor| checkpoint.tensor(tensor)).unwrap();
        for (target, fused) in [(Target::Portable, false), (Target::OrtCpu, false), (Target::OrtCpu, true)] {
            let what = format!("{name}, {target:?}, fused {fused}");
            let bundle = bundle(&checkpoint, &folder.path().join(format!("{target:?} {fused}")), target);
            let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
            let loader =
                OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators: fused }).unwrap();
            let mut engines = Engines::new(&bundle, Box::new(loader));
            plain_agrees(&what, &arch, &model, &mut engines);
            homer_agrees(&what, &arch, &model, &mut engines);
        }
    }
}

const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 20, max_initial_chunk_len: None, target_len: 16, layers_warmup: 1 };

fn bundle(checkpoint: &Checkpoint, out: &std::path::Path, target: Target) -> Bundle {
    let method = MethodSettings::Homer { settings: SETTINGS, tree_heights: vec![2], significance: None };
    export(
        checkpoint,
        out,
        &ExportOptions { method, target, weights: WeightStorage::Link, recipe: Recipe::fp32(), force: false },
    )
    .unwrap();
    Bundle::open(out).unwrap()
}

fn tokens(arch: &Llama, count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 31 % arch.vocab_size) as u32).collect()
}

/// 40 tokens at once and then 8 one by one: positions pass every trained length above.
fn plain_agrees(what: &str, arch: &Llama, model: &Reference, engines: &mut Engines<'_>) {
    let ids = tokens(arch, 48);
    let mut cache = model.empty_cache();
    let mut sequence = Sequence::new(engines, 40).unwrap();
    let mut start = 0;
    for count in [40, 1, 1, 1, 1, 1, 1, 1, 1] {
        let new = &ids[start..start + count];
        let positions: Vec<i64> = (start as i64..).take(count).collect();
        let hidden = reference::plain::forward(model, new, &positions, &mut cache, &mut NoTaps).unwrap();
        let expected = model.logits(&hidden);
        let found = sequence.forward(engines, new, count).unwrap();
        compare(&format!("{what}, plain from {start}"), found.as_f32().unwrap(), expected.as_slice().unwrap());
        start += count;
    }
    // What a state keeps is what the sequence computed.
    let state = plain::prefill(engines, &ids, |_| {}).unwrap();
    let last: Vec<f32> = {
        let mut cache = model.empty_cache();
        let positions: Vec<i64> = (0..48).collect();
        let hidden = reference::plain::forward(model, &ids, &positions, &mut cache, &mut NoTaps).unwrap();
        model.logits(&hidden).row(47).to_vec()
    };
    compare(&format!("{what}, state"), &state.logits, &last);
}

fn homer_agrees(what: &str, arch: &Llama, model: &Reference, engines: &mut Engines<'_>) {
    let ids = tokens(arch, 3 + 50 + 4);
    let (prefix, context, suffix) = (&ids[..3], &ids[3..53], &ids[53..]);
    let lengths = PromptLengths { prefix: 3, context: 50, suffix: 4 };
    let plan = HomerPlan::new(arch.num_layers, lengths, SETTINGS).unwrap();
    assert_eq!(plan.tree_height, 2);
    let bias: Vec<f32> = (0..=plan.max_distance()).map(|d| 0.3 / (1.0 + d as f32)).collect();
    let prompt = reference::homer::Prompt { prefix, context, suffix };
    let expected = reference::homer::compress(model, &plan, prompt, &|_| &bias, &mut NoTaps).unwrap();
    let logits = model.logits(&expected.last_hidden);

    let rows: Vec<&[f32]> = vec![&bias; arch.num_layers];
    let prompt = homer::Prompt { prefix, context, suffix };
    let state = homer::compress(engines, &plan, prompt, &rows, 2, &mut NoTaps, &mut |_| {}).unwrap();
    assert_eq!(state.position_ids, expected.position_ids, "{what}, homer positions");
    compare(&format!("{what}, homer"), &state.logits, logits.row(logits.nrows() - 1).as_slice().unwrap());

    let mut continuation = decode::Continuation::new(&expected, decode::ContinuationOffset::AfterLast);
    let mut sequence =
        Sequence::continue_from(engines, &state, 2, accordion::pipeline::decode::Continuation::Next).unwrap();
    for id in [5, 9] {
        let expected = continuation.feed(model, &[id], &mut NoTaps).unwrap();
        let found = sequence.forward(engines, &[id], 1).unwrap();
        compare(&format!("{what}, after homer"), found.as_f32().unwrap(), expected.as_slice().unwrap());
    }
}

#[test]
fn a_head_width_that_the_runtime_cannot_take_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("checkpoint");
    write_checkpoint(&dir, &Llama { head_dim: 12, ..base() }, &Storage { dtype: DType::F32, shards: 1 }, 7);
    let options = |target| ExportOptions {
        method: MethodSettings::Plain,
        target,
        weights: WeightStorage::Link,
        recipe: Recipe::fp32(),
        force: false,
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let out = folder.path().join("bundle");
    let error = export(&checkpoint, &out, &options(Target::OrtCpu)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("head_dim is 12") && error.contains("--target portable"), "{error}");
    assert!(!out.exists());
    export(&checkpoint, &out, &options(Target::Portable)).unwrap();
}
