//! Every method behind a context that is kept in 8-bit integers, on the graphs of both targets, against the reference that
//! rounds as they do. And faults of such a cache that this has to find.

use super::subject::{Subject, plain, subjects};
use super::{compare_whole, engines, worst};
use accordion::bundle::Bundle;
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::state_file::{Origin, SavedState, StateMethod};
use accordion::pipeline::state_precision::StatePrecision;
use accordion::pipeline::{ContextState, Engines, Scales, plain as reading};
use accordion::precision::Recipe;
use accordion::reference::decode::Continuation as Continued;
use accordion::reference::to_tensor;
use accordion::reference::transformer;
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion::verify::quantized::{bounds_of, weights_of};
use accordion::verify::verdict::{TapKind, Verdict, judge};
use accordion::verify::{Detail, Findings};
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::{KvCache, Precision};
use std::io::Write;

fn recipe(precision: Precision) -> Recipe {
    Recipe { kv_cache: KvCache::Int8, ..Recipe::of(precision) }
}

#[test]
fn every_method_behind_a_cache_of_integers_computes_what_the_reference_does() {
    let mut failures = Vec::new();
    for subject in subjects() {
        for precision in [Precision::Fp32, Precision::WeightInt8, Precision::Int8PerToken] {
            let targets = [
                (Target::Portable, false, "portable"),
                (Target::OrtCpu, false, "ort-cpu"),
                (Target::OrtCpu, true, "fused"),
            ];
            for (target, fused, name) in targets.into_iter().filter(|(target, ..)| subject.supports(*target)) {
                let bundle = subject.exported(recipe(precision), target);
                let mut engines = engines(&bundle, fused);
                let Findings { taps, not_comparable, .. } = compare_whole(&mut engines, subject.input(), Detail::All);
                let behind: Vec<_> = taps
                    .iter()
                    .filter(|tap| tap.name.starts_with("teacher.") || tap.name.starts_with("steps."))
                    .cloned()
                    .collect();
                let row = format!("{:<16} {precision:<15} {name:<9}", subject.name);
                let line = format!("  {row} {:>4} taps behind the context, {}", behind.len(), worst(&behind));
                writeln!(std::io::stderr().lock(), "{line}").unwrap();
                // Rounded activations may have decided otherwise what is kept of the context.
                assert!(!behind.is_empty() || not_comparable > 0, "{row}: nothing was decoded");
                for tap in taps.iter().filter(|tap| tap.verdict == Verdict::Fail).take(4) {
                    failures.push(format!("{row} {}: {}", tap.name, tap.reason));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// The prompt and what follows it.
fn divided(subject: &Subject) -> (&[u32], &[u32]) {
    let input = subject.input();
    input.ids.split_at(input.lengths.total())
}

/// The state of the prompt, read in fp32.
fn read(engines: &mut Engines<'_>, subject: &Subject) -> ContextState {
    reading::prefill(engines, divided(subject).0, |_| {}).unwrap()
}

/// Whether the decoder behind `state`, its logits and what it then keeps, agrees with the reference whose cache is rounded
/// behind the prompt.
fn agrees(engines: &mut Engines<'_>, subject: &Subject, state: &ContextState) -> bool {
    let bundle = engines.bundle();
    let (prompt, teacher) = divided(subject);
    let reference = transformer::load(bundle.architecture(), weights_of(bundle)).unwrap();
    let mut expected = Continued::after(reference.empty_cache());
    expected.feed(reference.as_ref(), prompt, &mut NoTaps).unwrap();
    let mut expected = expected.rounded();
    let logits = to_tensor(&expected.feed(reference.as_ref(), teacher, &mut NoTaps).unwrap()).unwrap();
    let mut sequence = Sequence::continue_from(engines, state, teacher.len(), Continuation::Next).unwrap();
    let found = sequence.forward(engines, teacher, teacher.len()).unwrap();
    let bounds = bounds_of(bundle);
    let same = |name: &str, found: &Tensor, expected: &Tensor| {
        let found = found.reshaped(expected.shape()).unwrap();
        judge(name, &found, expected, None, &bounds(name, TapKind::of(name))).verdict != Verdict::Fail
    };
    let layers = sequence.cache().unwrap();
    same("teacher.logits", &found, &logits)
        && layers.iter().zip(&expected.cache.layers).all(|([key, value], expected)| {
            same("cache.k.0", key, &to_tensor(&expected.k).unwrap())
                && same("cache.v.0", value, &to_tensor(&expected.v).unwrap())
        })
}

/// Something that can be wrong with the scales of keys or of values, `[1, G, 1, d]`.
type Fault = fn(Vec<f32>, usize) -> Vec<f32>;

const FAULTS: [(&str, Fault); 4] = [
    ("all scales are off by 2 %", |scale, _| scale.iter().map(|x| x * 1.02).collect()),
    ("the scales of half of the channels are off by 5 %", |scale, _| {
        scale.iter().enumerate().map(|(i, x)| if i % 2 == 0 { x * 1.05 } else { *x }).collect()
    }),
    ("one scale for all channels", |scale, _| {
        let largest = scale.iter().fold(0.0_f32, |largest, x| largest.max(*x));
        vec![largest; scale.len()]
    }),
    ("channels and heads are transposed", |scale, heads| {
        let channels = scale.len() / heads;
        // Of one head that is all the same: the channels in the other order then.
        if heads == 1 {
            return scale.into_iter().rev().collect();
        }
        (0..scale.len()).map(|i| scale[i % heads * channels + i / heads]).collect()
    }),
];

#[test]
fn every_fault_of_the_scales_is_found() {
    let subject = plain("C");
    let bundle = subject.exported(recipe(Precision::Fp32), Target::Portable);
    let mut engines = engines(&bundle, false);
    let state = read(&mut engines, &subject).into_numbers(KvCache::Int8).unwrap();
    assert!(agrees(&mut engines, &subject, &state), "there is a fault already");
    for (name, fault) in FAULTS {
        let faulty = |scale: &Tensor| {
            let numbers = fault(scale.to_f32(), bundle.architecture().num_kv_heads());
            Tensor::from_f32(scale.shape(), numbers).unwrap()
        };
        let scales = state.scales.as_ref().unwrap();
        for part in 0..2 {
            let cache = scales.cache.iter().map(|layer| {
                let mut layer = layer.clone();
                layer[part] = faulty(&layer[part]);
                layer
            });
            let scales = Some(Scales { cache: cache.collect(), injected: None });
            let broken = ContextState { scales, ..state.clone() };
            assert!(!agrees(&mut engines, &subject, &broken), "{name} of part {part}, and nobody sees it");
        }
    }
}

/// Rows of a sequence that was fed `ids` behind one row, and what a cache of fp32 holds after the same.
fn behind_one_row(bundle: &Bundle, fused: bool, ids: &[u32]) -> [Vec<[Tensor; 2]>; 2] {
    let mut engines = engines(bundle, fused);
    let state = reading::prefill(&mut engines, &ids[..1], |_| {}).unwrap();
    let mut sequence = Sequence::continue_from(&engines, &state, 0, Continuation::Next).unwrap();
    for id in &ids[1..] {
        sequence.forward(&mut engines, std::slice::from_ref(id), 1).unwrap();
    }
    let exact = reading::prefill(&mut engines, ids, |_| {}).unwrap().cache;
    [sequence.cache().unwrap(), exact]
}

/// Behind a context of a single row, nearly every number is beyond what its channel has held so far.
#[test]
fn nothing_is_clipped_however_short_the_context() {
    let subject = plain("C");
    for (target, fused) in [(Target::Portable, false), (Target::OrtCpu, false), (Target::OrtCpu, true)] {
        if !subject.supports(target) {
            continue;
        }
        let bundle = subject.exported(recipe(Precision::Fp32), target);
        let [found, exact] = behind_one_row(&bundle, fused, divided(&subject).0);
        for (layer, (found, exact)) in found.iter().zip(&exact).enumerate() {
            for (found, exact) in found.iter().zip(exact) {
                let width = *exact.shape().last().unwrap();
                let heads = exact.shape()[1];
                let (found, exact) = (found.to_f32(), exact.to_f32());
                let plane = exact.len() / heads;
                for head in 0..heads {
                    for channel in 0..width {
                        let column = |x: &[f32]| -> Vec<f32> {
                            x[head * plane..(head + 1) * plane].iter().skip(channel).step_by(width).copied().collect()
                        };
                        let (found, exact) = (column(&found), column(&exact));
                        let largest = exact.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                        for (row, (found, exact)) in found.iter().zip(&exact).enumerate() {
                            // Rounded some times, and a little off by what was rounded in lower layers.
                            assert!(
                                (found - exact).abs() <= 0.05 * largest,
                                "{target:?}, layer {layer}, head {head}, channel {channel}, row {row}: {found}, {exact}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// A file of integers goes to the decoder as it is, and one of fp32 is rounded once, whatever bundle made it.
#[test]
fn saved_states_are_kept_as_they_are() {
    let subject = plain("C");
    let fp32 = subject.exported(Recipe::fp32(), Target::Portable);
    let int8 = subject.exported(recipe(Precision::Fp32), Target::Portable);
    let state = read(&mut engines(&fp32, false), &subject);
    let (prompt, _) = divided(&subject);
    let lengths = accordion_graphs::plan::PromptLengths { prefix: 0, context: prompt.len() - 1, suffix: 1 };
    let folder = tempfile::tempdir().unwrap();
    let rounded = state.clone().into_numbers(KvCache::Int8).unwrap();
    for stored_as in [StatePrecision::Fp32, StatePrecision::Int8] {
        let origin = Origin { stored_as, ..Origin::new(&fp32, StateMethod::Plain, "text", lengths) };
        let path = folder.path().join("state");
        let suffix_ids = prompt[prompt.len() - 1..].to_vec();
        SavedState { state: state.clone(), prefix_ids: Vec::new(), suffix_ids, origin }.save(&path).unwrap();
        let found = ContextState::load(&path, &int8).unwrap().state;
        let [scales, expected] = [&found, &rounded].map(|state| &state.scales.as_ref().unwrap().cache);
        for (found, expected) in found.cache.iter().chain(scales).zip(rounded.cache.iter().chain(expected)) {
            for (found, expected) in found.iter().zip(expected) {
                assert_eq!(found.bytes(), expected.bytes(), "{stored_as:?}");
            }
        }
        assert!(found.cache_bytes() * 3 < state.cache_bytes());
        let back = ContextState::load(&path, &fp32).unwrap().state;
        assert!(back.scales.is_none() && back.cache[0][0].as_f32().is_ok());
    }
}
