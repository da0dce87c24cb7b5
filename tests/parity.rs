//! A real model and real text: SmolLM2-135M and a novel, fetched into the cache, on the graphs of both targets against the
//! reference.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, import_gguf};
use accordion::fetch::{Cache, Fetched, asset};
use accordion::pipeline::Engines;
use accordion::reference::llama::Llama;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::homer::{HomerInput, compare_homer};
use accordion::verify::plain::compare_plain;
use accordion::verify::verdict::{Difference, TapResult, Verdict};
use accordion::verify::{Detail, Findings};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
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
        let out: PathBuf = self.folder.path().join(name);
        let options = ExportOptions { method, target, weights: WeightStorage::Link, force: false };
        export(&self.checkpoint, &out, &options).unwrap();
        Bundle::open(out).unwrap()
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
    for (name, target, fused) in [("portable", Target::Portable, false), ("ort-cpu fused", Target::OrtCpu, true)] {
        plain(&subject, name, target, fused);
        homer(&subject, name, target, fused);
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
