//! Every method in every precision that quantizes, on the graphs of both targets, against the reference that quantizes as they
//! do: the models and prompts of the golden cases, whole and one linear layer after the other. And faults that this has to
//! find.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faults;
mod ranges;
mod subject;

use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::Detail;
use accordion::verify::bundle::compare_bundle;
use accordion::verify::linears::LinearCheck;
use accordion::verify::quantized::weights_of;
use accordion::verify::verdict::{TapResult, Verdict};
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

/// What is found of `bundle`: of its linear layers, and of the whole.
fn findings(subject: &Subject, bundle: &Bundle, fused: bool) -> [Vec<TapResult>; 2] {
    let mut engines = engines(bundle, fused);
    let linears = LinearCheck::watch(&mut engines, weights_of(bundle));
    let whole = compare_bundle(&mut engines, &subject.input(), Detail::All, &mut |_| {}).unwrap();
    [linears.finish().unwrap(), whole.taps]
}

/// The largest share of a bound that is used, and of what.
fn worst(results: &[TapResult]) -> (f64, &str) {
    let uses = results.iter().map(|tap| (tap.bound_use.unwrap_or(f64::INFINITY), tap.name.as_str()));
    uses.fold((0.0, "none"), |worst, other| if other.0 > worst.0 { other } else { worst })
}

#[test]
fn graphs_of_every_precision_compute_what_the_reference_does() {
    let mut failures = Vec::new();
    for subject in subjects() {
        for precision in PRECISIONS {
            let targets = [(Target::Portable, false, "portable"), (Target::OrtCpu, false, "ort-cpu"), (Target::OrtCpu, true, "fused")];
            for (target, fused, name) in targets.into_iter().filter(|(target, ..)| subject.supports(*target)) {
                let bundle = subject.exported(subject.recipe(precision), target);
                let [linears, whole] = findings(&subject, &bundle, fused);
                let row = format!("{:<22} {precision:<15} {name:<9}", subject.name);
                let quantized = bundle.manifest().quantization.as_ref().unwrap();
                let matrices: std::collections::BTreeSet<&str> =
                    linears.iter().filter_map(|tap| tap.name.strip_prefix("linears.")?.split_once('.')).map(|(_, m)| m).collect();
                let (one, all) = (worst(&linears), worst(&whole));
                // Past the harness's capture: how close it was says more than that it passed.
                let line = format!("  {row} {:>3} matrices {:>8.1e} of the bound ({}), {:>4} taps {:>8.1e} ({})", matrices.len(), one.0, one.1, whole.len(), all.0, all.1);
                writeln!(std::io::stderr().lock(), "{line}").unwrap();
                for tap in linears.iter().chain(&whole).filter(|tap| tap.verdict == Verdict::Fail).take(4) {
                    failures.push(format!("{row} {}: {}", tap.name, tap.reason));
                }
                // Matrices whose rows are only looked up are no linear layers.
                let missed: Vec<&String> = quantized.matrices.keys().filter(|name| !matrices.contains(name.as_str()) && !name.contains("embed")).collect();
                assert!(missed.is_empty(), "{row}: {missed:?} were not met");
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
