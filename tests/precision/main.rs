//! Every method in every precision that quantizes, on the graphs of both targets, against the reference that quantizes as they
//! do: the models and prompts of the golden cases, whole and one linear layer after the other. And faults that this has to
//! find.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faults;
mod kv_cache;
mod ranges;
mod resident;
mod subject;

use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::bundle::{Input, engine_parts, reference_parts};
use accordion::verify::linears::LinearCheck;
use accordion::verify::lockstep::against_reference;
use accordion::verify::parts::Parts;
use accordion::verify::quantized::weights_of;
use accordion::verify::verdict::{TapResult, Verdict};
use accordion::verify::{Detail, Findings};
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::Precision;
use std::io::Write;
use subject::{Subject, subjects};

/// Those that are checked here.
const PRECISIONS: [Precision; 5] =
    [Precision::WeightInt8, Precision::WeightInt4, Precision::Int8PerToken, Precision::Int8, Precision::Fp8];

fn engines(bundle: &Bundle, fused_operators: bool) -> Engines<'_> {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let loader = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators }).unwrap();
    Engines::new(bundle, Box::new(loader))
}

/// Everything that `engines` compute of `input` against the reference.
fn compare_whole(engines: &mut Engines<'_>, input: Input<'_>, detail: Detail) -> Findings {
    let bundle = engines.bundle();
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(bundle, &input, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, &input, parts, &mut |_| {}))
        .unwrap()
}

/// What is found of `bundle`: of its linear layers, and of the whole.
fn findings(subject: &Subject, bundle: &Bundle, fused: bool) -> [Vec<TapResult>; 2] {
    let mut engines = engines(bundle, fused);
    let linears = LinearCheck::watch(&mut engines, weights_of(bundle));
    let whole = compare_whole(&mut engines, subject.input(), Detail::All);
    [linears.finish().unwrap(), whole.taps]
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
        for precision in PRECISIONS {
            let targets = [
                (Target::Portable, false, "portable"),
                (Target::OrtCpu, false, "ort-cpu"),
                (Target::OrtCpu, true, "fused"),
            ];
            for (target, fused, name) in targets.into_iter().filter(|(target, ..)| subject.supports(*target)) {
                let bundle = subject.exported(subject.recipe(precision), target);
                let [linears, whole] = findings(&subject, &bundle, fused);
                let row = format!("{:<16} {precision:<15} {name:<9}", subject.name);
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
                let matrices = &bundle.manifest().quantization.as_ref().unwrap().matrices;
                let missed: Vec<&String> = matrices.keys().filter(|matrix| !met(matrix)).collect();
                assert!(missed.is_empty(), "{row}: {missed:?} were not met");
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
