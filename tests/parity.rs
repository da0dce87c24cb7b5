//! A real model and real text: SmolLM2-135M and a novel, fetched into the cache, on the graphs of both targets against the
//! reference.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, import_gguf};
use accordion::convert::{CrossAttention, SharedLlmOptions, to_sharedllm};
use accordion::fetch::{Cache, Fetched, asset};
use accordion::pipeline::Engines;
use accordion::pipeline::decode::Sequence;
use accordion::pipeline::sharedllm::{Context, inject};
use accordion::precision::Recipe;
use accordion::reference::llama::Llama;
use accordion::reference::sharedllm::{Prompt, RunningText, SharedLlm, compress};
use accordion::reference::to_tensor;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion::verify::homer::{HomerInput, compare_homer};
use accordion::verify::plain::compare_plain;
use accordion::verify::verdict::{Bounds, Difference, TapKind, TapResult, Verdict, judge};
use accordion::verify::{Detail, Findings};
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Keep, Quirks, SharedLlmPlan, SharedLlmSettings};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Rows whose logits are compared.
const ROWS: usize = 512;
/// Furthest that a logit may be off.
const LOGITS: f64 = 2e-3;
/// Furthest that any tap may be off, relative to the largest magnitude in it.
const RELATIVE: f64 = 1e-4;

fn fetch(name: &str) -> Fetched {
    let cache = Cache::from_environment().unwrap();
    cache
        .fetch(asset::named(name).unwrap(), &mut |_| {})
        .unwrap_or_else(|e| panic!("this test needs the asset {name}, which cannot be fetched: {e}"))
}

/// The bundles' checkpoint, the reference over it, and the first tokens of the novel.
struct Subject {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    reference: Llama,
    ids: Vec<u32>,
}

impl Subject {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        import_gguf(fetch("smollm2-135m").path(), &dir, |_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(dir).unwrap();
        let Architecture::Llama(llama) = checkpoint.architecture() else { panic!("SmolLM2 is a Llama") };
        let reference = Llama::load(llama, |name| checkpoint.tensor(name)).unwrap();
        let text = std::fs::read_to_string(fetch("demo-text").path()).unwrap();
        let start: String = text.chars().take(16_000).collect();
        let ids = checkpoint.tokenizer().unwrap().encode(&start, false).unwrap();
        Self { folder, checkpoint, reference, ids }
    }

    fn bundle(&self, name: &str, method: MethodSettings, target: Target) -> Bundle {
        self.bundle_of(&self.checkpoint, name, method, target)
    }

    fn bundle_of(&self, checkpoint: &Checkpoint, name: &str, method: MethodSettings, target: Target) -> Bundle {
        let out: PathBuf = self.folder.path().join(name);
        let options =
            ExportOptions { method, target, weights: WeightStorage::Link, recipe: Recipe::fp32(), force: false };
        export(checkpoint, &out, &options).unwrap();
        Bundle::open(out).unwrap()
    }

    /// The checkpoint converted to SharedLLM.
    fn converted(&self, name: &str, cross_attention: CrossAttention) -> Checkpoint {
        let out = self.folder.path().join(name);
        let SharedLlmSettings { keep, tree_depth, retrieval, .. } = SHARED;
        let options = SharedLlmOptions { layers: INJECTED, cross_attention, keep, tree_depth, retrieval, force: false };
        to_sharedllm(&self.checkpoint, &out, &options).unwrap();
        Checkpoint::open(out).unwrap()
    }
}

fn engines(bundle: &Bundle, fused_operators: bool) -> Engines<'_> {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let loader = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators }).unwrap();
    Engines::new(bundle, Box::new(loader))
}

fn tap<'f>(findings: &'f Findings, name: &str) -> &'f TapResult {
    findings.taps.iter().find(|tap| tap.name == name).unwrap_or_else(|| panic!("no tap {name}"))
}

/// Every float within [`RELATIVE`] of its tensor's scale, every integer equal, and the verdict no failure.
fn check_all(what: &str, findings: &Findings) {
    let mut worst = (0.0, "");
    for tap in &findings.taps {
        assert_ne!(tap.verdict, Verdict::Fail, "{what}: {}: {}", tap.name, tap.reason);
        if let Some(values) = tap.difference.values() {
            let relative = values.max_abs / values.scale;
            assert!(relative < RELATIVE, "{what}: {}: {}", tap.name, tap.reason);
            if relative > worst.0 {
                worst = (relative, &tap.name);
            }
        }
    }
    let (relative, name) = worst;
    let (taps, left_out) = (findings.taps.len(), findings.not_comparable);
    println!("{what}: {taps} taps, {left_out} not comparable, worst {relative:.1e} of its scale ({name})");
}

fn check_logits(what: &str, logits: &TapResult, rows: usize) {
    let Difference::Logits { values, choices } = &logits.difference else { panic!("{what}: {logits:?}") };
    println!(
        "{what}: {rows} rows of logits, max abs {:.1e}, top-5 overlap {:.4}",
        values.max_abs, choices.mean_overlap
    );
    assert_eq!((choices.rows, choices.argmax_matches), (rows, rows), "{what}");
    assert!(values.max_abs < LOGITS, "{what}: {}", values.max_abs);
}

#[test]
fn smollm2_agrees_with_the_reference() {
    let subject = Subject::new();
    let trained = Expected::new(&subject);
    let untrained = subject.converted("zero", CrossAttention::Zero);
    for (name, target, fused) in [("portable", Target::Portable, false), ("ort-cpu fused", Target::OrtCpu, true)] {
        plain(&subject, name, target, fused);
        homer(&subject, name, target, fused);
        sharedllm(&subject, &trained, name, target, fused);
        without_effect(&subject, &untrained, name, target, fused);
    }
}

fn plain(subject: &Subject, name: &str, target: Target, fused: bool) {
    let what = format!("plain, {name}");
    let bundle = subject.bundle(&what, MethodSettings::Plain, target);
    let findings = compare_plain(
        &mut engines(&bundle, fused),
        &subject.reference,
        &subject.ids[..ROWS],
        &[],
        Detail::All,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(findings.taps.len(), 30 * 7 + 1 + 30 * 2);
    check_all(&what, &findings);
    check_logits(&what, tap(&findings, "logits"), ROWS);
}

fn homer(subject: &Subject, name: &str, target: Target, fused: bool) {
    let what = format!("homer, {name}");
    let settings =
        HomerSettings { max_chunk_len: 512, max_initial_chunk_len: None, target_len: 512, layers_warmup: 12 };
    let (lengths, teacher) = (PromptLengths { prefix: 16, context: 1500, suffix: 16 }, 8);
    let plan = HomerPlan::new(30, lengths, settings).unwrap();
    assert_eq!(plan.tree_height, 2);
    let bundle =
        subject.bundle(&what, MethodSettings::Homer { settings, tree_heights: vec![2], significance: None }, target);
    let (prefix, rest) = subject.ids.split_at(lengths.prefix);
    let (context, rest) = rest.split_at(lengths.context);
    let (suffix, rest) = rest.split_at(lengths.suffix);
    // Parity does not depend on the table, as long as both sides have the same.
    let row: Vec<f32> = (0..=plan.max_distance()).map(|distance| 3.0 - (1.0 + distance as f32).ln()).collect();
    let bias = vec![row.as_slice(); 30];
    let input = HomerInput { plan: &plan, prefix, context, suffix, teacher: &rest[..teacher], bias: &bias, width: 1 };
    let findings =
        compare_homer(&mut engines(&bundle, fused), &subject.reference, &input, Detail::All, &mut |_| {}).unwrap();
    check_all(&what, &findings);
    let ambiguous = findings.taps.iter().any(|tap| tap.verdict == Verdict::Ambiguous);
    assert_eq!(ambiguous, findings.not_comparable > 0, "{what}");
    if !ambiguous {
        check_logits(&what, tap(&findings, "prefix.logits"), 1);
        check_logits(&what, tap(&findings, "teacher.logits"), teacher);
    }
}

/// SharedLLM's settings: two chunks of 512 tokens.
const SHARED: SharedLlmSettings = SharedLlmSettings {
    chunk_len: 512,
    tree_depth: 3,
    keep: Keep::Tokens(32),
    retrieval: true,
    quirks: Quirks::Faithful,
};
const CHUNKS: usize = 2;
/// Bottom layers that attend to the context.
const INJECTED: usize = 4;
/// Tokens that the upper model reads at once, and then one by one.
const RUNNING: usize = 64;
const STEPS: usize = 3;

/// The first tokens of the novel as chunks, the running text behind them, and what is fed token by token behind that.
fn shared_parts(ids: &[u32]) -> [&[u32]; 3] {
    let (context, rest) = ids.split_at(CHUNKS * SHARED.chunk_len);
    let (running, rest) = rest.split_at(RUNNING);
    [context, running, &rest[..STEPS]]
}

fn shared_plan() -> SharedLlmPlan {
    let lengths = PromptLengths { prefix: 0, context: CHUNKS * SHARED.chunk_len, suffix: RUNNING };
    SharedLlmPlan::new(lengths, SHARED, ChunkPolicy::Chunks(CHUNKS)).unwrap()
}

/// What the reference makes of a model whose cross attention begins as its self attention: the tree, the running text, the
/// steps behind it.
struct Expected {
    checkpoint: Checkpoint,
    taps: BTreeMap<String, Tensor>,
    /// Of the running text's rows, then of every step.
    logits: Vec<Tensor>,
}

impl Expected {
    fn new(subject: &Subject) -> Self {
        let checkpoint = subject.converted("copy", CrossAttention::Copy);
        let (Architecture::Llama(upper), Some(Compressor::SharedLlm(model))) =
            (checkpoint.architecture(), checkpoint.compressor())
        else {
            panic!("{:?}", checkpoint.compressor())
        };
        let reference = SharedLlm::load(upper, model, |name| checkpoint.tensor(name)).unwrap();
        let [context, running, steps] = shared_parts(&subject.ids);
        let (mask, query_index) = (vec![true; context.len()], running.len() - 1);
        let prompt = Prompt { context, mask: &mask, running, query_index };
        let mut taps = BTreeMap::new();
        let injected = compress(&reference, &shared_plan(), prompt, &mut taps).unwrap();
        let mut text = RunningText::new(&reference, &injected);
        let read = text.feed(&reference, running, &mut taps).unwrap();
        let steps = steps.chunks(1).map(|id| text.feed(&reference, id, &mut NoTaps).unwrap());
        let logits = std::iter::once(read).chain(steps).map(|logits| to_tensor(&logits).unwrap()).collect();
        Self { checkpoint, taps, logits }
    }
}

fn sharedllm(subject: &Subject, expected: &Expected, name: &str, target: Target, fused: bool) {
    let what = format!("sharedllm, {name}");
    let bundle = subject.bundle_of(&expected.checkpoint, &what, MethodSettings::SharedLlm(SHARED), target);
    let mut engines = engines(&bundle, fused);
    let [ids, running, steps] = shared_parts(&subject.ids);
    let context = Context { ids, mask: None, running, query_index: running.len() - 1 };
    let mut found = BTreeMap::new();
    let injected = inject(&mut engines, &shared_plan(), context, 1, &mut found, &mut |_| {}).unwrap();
    let mut sequence = Sequence::attending_to(&engines, injected, 0).unwrap();
    let of_layers = engines.signature("decoder").unwrap().taps.iter().filter(|(tap, _)| tap.starts_with("layers."));
    let (names, values): (Vec<&String>, Vec<&str>) = of_layers.map(|(tap, value)| (tap, value.name.as_str())).unzip();
    let (logits, tapped) = sequence.forward_tapped(&mut engines, running, running.len(), &values).unwrap();
    found.extend(names.into_iter().cloned().zip(tapped));
    let judged = |name: &str, found: &Tensor, expected: &Tensor| {
        judge(name, found, expected, None, &Bounds::new(TapKind::of(name), DType::F32))
    };
    // The engine groups some rows by chunk.
    let grouped = |value: &Tensor, expected: &Tensor| value.reshaped(expected.shape()).ok();
    let taps = found.iter().filter_map(|(name, value)| {
        let expected = expected.taps.get(name)?;
        Some(judged(name, &grouped(value, expected)?, expected))
    });
    let taps: Vec<TapResult> = taps.collect();
    let has = |end: &str| taps.iter().filter(|tap| tap.name.ends_with(end)).count();
    assert_eq!([has(".chosen"), has(".cross.out"), has("cross_residual")], [SHARED.tree_depth - 1, INJECTED, INJECTED]);
    assert!(taps.iter().any(|tap| tap.name == "kv.1.key") && taps.iter().any(|tap| tap.name == "layers.29.out"));
    // Untrained cross attention drives the streams of the first rows up to 25 000, most of which later layers take away
    // again: what rounding leaves of that is 2.4e-3 in the logits of one row and less than 5e-4 in all others. They are held
    // against their scale, as every tap is, and those that generation goes on from against the bound of logits.
    let all = judged("logits", &logits, &expected.logits[0]);
    let Difference::Logits { choices, .. } = &all.difference else { panic!("{what}: {all:?}") };
    assert_eq!((choices.rows, choices.argmax_matches), (RUNNING, RUNNING), "{what}");
    let taps = taps.into_iter().chain([all]).collect();
    check_all(&what, &Findings { taps, ..Findings::default() });
    let [last, expected_last] = [&logits, &expected.logits[0]].map(|logits| logits.rows(RUNNING - 1..RUNNING));
    check_logits(&what, &judged("logits", &last, &expected_last), 1);
    for (id, expected) in steps.chunks(1).zip(&expected.logits[1..]) {
        let logits = sequence.forward(&mut engines, id, 1).unwrap();
        check_logits(&what, &judged("logits", &logits, expected), 1);
    }
}

/// Cross attention whose output projection is zero adds nothing, and adding zero changes no bit: whatever the context is, the
/// model computes what it computed before.
fn without_effect(subject: &Subject, untrained: &Checkpoint, name: &str, target: Target, fused: bool) {
    let [ids, running, steps] = shared_parts(&subject.ids);
    let bundle = subject.bundle(&format!("before, {name}"), MethodSettings::Plain, target);
    let mut before = engines(&bundle, fused);
    let mut sequence = Sequence::new(&before, 0).unwrap();
    let mut logits = |ids: &[u32]| sequence.forward(&mut before, ids, ids.len()).unwrap().to_f32();
    let expected: Vec<Vec<f32>> = std::iter::once(running).chain(steps.chunks(1)).map(&mut logits).collect();

    let method = MethodSettings::SharedLlm(SHARED);
    let bundle = subject.bundle_of(untrained, &format!("zero, {name}"), method, target);
    let mut after = engines(&bundle, fused);
    let backwards: Vec<u32> = ids.iter().rev().copied().collect();
    for ids in [ids, &backwards] {
        let context = Context { ids, mask: None, running, query_index: running.len() - 1 };
        let injected = inject(&mut after, &shared_plan(), context, 1, &mut NoTaps, &mut |_| {}).unwrap();
        let mut sequence = Sequence::attending_to(&after, injected, 0).unwrap();
        for (ids, expected) in std::iter::once(running).chain(steps.chunks(1)).zip(&expected) {
            let found = sequence.forward(&mut after, ids, ids.len()).unwrap().to_f32();
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(found == *expected, "{name}: {} tokens, off by {worst:e}", ids.len());
        }
    }
}
