//! Every method in every precision but fp32, on the graphs of both targets, against the reference that rounds as they do: the
//! models and prompts of the golden cases, whole and one linear layer after the other. And faults that this has to find.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faults;
mod host;
mod host_steps;
mod kv_cache;
mod numbers;
mod ranges;
mod resident;
mod steps;
mod stepwise;
mod subject;

use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::precision::Recipe;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::taps::TapSink;
use accordion::tensor::Tensor;
use accordion::verify::bundle::{Input, engine_parts, reference_parts};
use accordion::verify::linears::LinearCheck;
use accordion::verify::lockstep::against_reference;
use accordion::verify::parts::Parts;
use accordion::verify::quantized::weights_of;
use accordion::verify::verdict::{TapResult, Verdict};
use accordion::verify::{Detail, Findings, VerifyError};
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::Precision;
use std::collections::BTreeSet;
use std::io::Write;
use subject::{Subject, subjects};

/// Those that quantize.
const QUANTIZED: [Precision; 5] =
    [Precision::WeightInt8, Precision::WeightInt4, Precision::Int8PerToken, Precision::Int8, Precision::Fp8];

/// How `subject` is exported for `target` in every precision that runs there.
fn recipes(subject: &Subject, target: Target) -> Vec<Recipe> {
    let sixteen_bits: &[_] = match target {
        // ONNX Runtime has no kernels on the CPU that compute in bf16.
        Target::Portable => &[(Precision::Fp16, false), (Precision::Fp16, true), (Precision::Bf16, true)],
        Target::OrtCpu => &[(Precision::Fp16, false), (Precision::Bf16, false)],
    };
    let rounded = sixteen_bits.iter().map(|&(precision, emulated)| Recipe { emulated, ..Recipe::of(precision) });
    QUANTIZED.into_iter().map(|precision| subject.recipe(precision)).chain(rounded).collect()
}

/// The matrices of linear layers that are not in fp32.
fn changed_matrices(bundle: &Bundle) -> BTreeSet<String> {
    let manifest = bundle.manifest();
    let quantization = manifest.quantization.as_ref().unwrap();
    if quantization.rounding.is_none() {
        return quantization.matrices.keys().cloned().collect();
    }
    manifest.graphs.values().flat_map(|graph| graph.signature.linears.keys().cloned()).collect()
}

fn loader(bundle: &Bundle, fused_operators: bool) -> OrtCpu {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators }).unwrap()
}

fn engines(bundle: &Bundle, fused_operators: bool) -> Engines<'_> {
    Engines::new(bundle, Box::new(loader(bundle, fused_operators)))
}

/// Everything that `engines` compute of `input` against the reference.
fn compare_whole(engines: &mut Engines<'_>, input: Input<'_>, detail: Detail) -> Findings {
    let bundle = engines.bundle();
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(bundle, &input, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, &input, parts, &mut |_| {}))
        .unwrap()
}

/// What is found of `bundle`: of its linear layers, and of the whole, which in 16 bits is held against the authors' tensors
/// (tests/conformance) and not here.
fn findings(subject: &Subject, bundle: &Bundle, fused: bool) -> [Vec<TapResult>; 2] {
    let mut engines = engines(bundle, fused);
    let linears = LinearCheck::watch(&mut engines, weights_of(bundle));
    let mut whole = Vec::new();
    if bundle.manifest().quantization.as_ref().is_some_and(|quantization| quantization.rounding.is_some()) {
        engine_parts(&mut engines, &subject.input(), &mut Nowhere, &mut |_| {}).unwrap();
    } else {
        whole = compare_whole(&mut engines, subject.input(), Detail::All).taps;
    }
    [linears.finish().unwrap(), whole]
}

/// Takes nothing.
struct Nowhere;

impl TapSink for Nowhere {
    fn wants(&self, _: &str) -> bool {
        false
    }

    fn record(&mut self, _: &str, _: Tensor) {}
}

impl Parts for Nowhere {
    fn end_part(&mut self, _: &str) -> Result<(), VerifyError> {
        Ok(())
    }
}

/// The largest share of a bound that is used, and by what.
fn worst(results: &[TapResult]) -> String {
    let uses = results.iter().map(|tap| (tap.bound_use.unwrap_or(f64::INFINITY), tap.name.as_str()));
    let worst = uses.fold((0.0, "all"), |worst, other| if other.0 > worst.0 { other } else { worst });
    format!("at most {:.1e} of the bound ({})", worst.0, worst.1)
}

#[test]
fn graphs_of_every_precision_compute_what_the_reference_does() {
    let mut failures = Vec::new();
    for subject in subjects() {
        let targets = [
            (Target::Portable, false, "portable"),
            (Target::OrtCpu, false, "ort-cpu"),
            (Target::OrtCpu, true, "fused"),
        ];
        for (target, fused, name) in targets.into_iter().filter(|(target, ..)| subject.supports(*target)) {
            for recipe in recipes(&subject, target) {
                let precision = format!("{}{}", recipe.precision, if recipe.emulated { ", emulated" } else { "" });
                let bundle = subject.exported(recipe, target);
                let [linears, whole] = findings(&subject, &bundle, fused);
                let row = format!("{:<16} {name:<9} {precision:<15}", subject.name);
                let [one, all] = [&linears, &whole].map(|results| worst(results));
                // Past the harness's capture: how close it was says more than that it passed.
                let line = format!("  {row} {:>4} linear layers, {one}; {:>4} taps, {all}", linears.len(), whole.len());
                writeln!(std::io::stderr().lock(), "{line}").unwrap();
                for tap in linears.iter().chain(&whole).filter(|tap| tap.verdict == Verdict::Fail).take(4) {
                    failures.push(format!("{row} {}: {}", tap.name, tap.reason));
                }
                // A model whose embedding is not its head only looks rows of it up.
                let met = |matrix: &String| {
                    matrix.contains("embed") || linears.iter().any(|tap| tap.name.ends_with(matrix.as_str()))
                };
                let missed: Vec<String> = changed_matrices(&bundle).into_iter().filter(|name| !met(name)).collect();
                assert!(missed.is_empty(), "{row}: {missed:?} were not met");
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
