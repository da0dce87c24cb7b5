//! Faults on one side that the comparison has to find, in every matrix and every precision that can have them.

use super::subject::{Subject, one_of_each, plain};
use super::{Nowhere, QUANTIZED, changed_matrices, engines, recipes};
use accordion::bundle::Bundle;
use accordion::checkpoint::CheckpointError;
use accordion::precision::Recipe;
use accordion::reference::quantize::{Numbers, Rounding, Weight};
use accordion::reference::transformer;
use accordion::tensor::Tensor;
use accordion::verify::Detail;
use accordion::verify::bundle::engine_parts;
use accordion::verify::linears::LinearCheck;
use accordion::verify::plain::compare_plain;
use accordion::verify::quantized::weights_of;
use accordion::verify::verdict::Verdict;
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::Precision;

/// Something that can be wrong with a matrix; `None` where it cannot have it.
type Fault = fn(&Weight) -> Option<Weight>;

const FAULTS: [(&str, Fault); 8] = [
    ("the scale of every other row is off by 2 %", |weight| {
        Some(changed(weight, |row, _, columns, w| if row % 2 == 1 && columns > 1 { w * 1.02 } else { w }))
    }),
    ("all scales are off by 2 %", |weight| Some(changed(weight, |_, _, _, w| w * 1.02))),
    ("a zero point is missing", |weight| {
        let most = weight.tensor.to_f32().iter().fold(0.0_f32, |most, w| most.max(w.abs()));
        // One of the smallest that there are.
        Some(changed(weight, |_, _, _, w| w + most / 127.0))
    }),
    ("a sign is lost", |weight| Some(changed(weight, |_, column, _, w| if column == 0 { w.abs() } else { w }))),
    ("the channel axis is transposed", |weight| {
        let &[rows, columns] = weight.tensor.shape() else { return None };
        let numbers = weight.tensor.to_f32();
        let peak = |row: usize| numbers[row * columns..][..columns].iter().fold(0.0_f32, |most, w| most.max(w.abs()));
        // The scale of row c where that of row r belongs.
        Some(changed(weight, |row, column, _, w| w / peak(row) * peak(column % rows)))
    }),
    ("the scale of activations is off by 2 %", |weight| {
        let numbers = match weight.rounding.as_ref()?.numbers {
            Numbers::Int8(scale) => Numbers::Int8(scale * 1.02),
            // The mantissas of 8-bit floats are coarse: the same numbers scaled by a power of two would be the same.
            Numbers::Float8(scale) => Numbers::Float8(scale * 1.02),
            Numbers::Int8PerRow => return None,
        };
        let rounding = Rounding { numbers, ..weight.rounding.clone()? };
        Some(Weight { tensor: weight.tensor.clone(), rounding: Some(rounding) })
    }),
    ("activations are not rounded", |weight| {
        weight.rounding.as_ref()?.factors.is_none().then(|| weight.tensor.clone().into())
    }),
    ("smoothing is applied inversely", |weight| {
        let rounding = weight.rounding.clone()?;
        let factors = rounding.factors?.iter().map(|factor| 1.0 / factor).collect();
        Some(Weight { tensor: weight.tensor.clone(), rounding: Some(Rounding { factors: Some(factors), ..rounding }) })
    }),
];

/// The weight with every number at a row and a column of so many columns changed.
fn changed(weight: &Weight, change: impl Fn(usize, usize, usize, f32) -> f32) -> Weight {
    let columns = weight.tensor.shape().last().copied().unwrap();
    let numbers = weight.tensor.to_f32().into_iter().enumerate();
    let numbers = numbers.map(|(i, w)| change(i / columns, i % columns, columns, w)).collect();
    let tensor = Tensor::from_f32(weight.tensor.shape(), numbers).unwrap();
    Weight { tensor, rounding: weight.rounding.clone() }
}

/// Every linear layer with the fault on the reference's side: how many matrices have it, and those in which nobody sees it.
fn unseen(subject: &Subject, bundle: &Bundle, fault: Fault) -> (usize, Vec<String>) {
    let (source, matrices) = (weights_of(bundle), changed_matrices(bundle));
    let can_have: Vec<&String> = matrices.iter().filter(|name| fault(&source(name).unwrap()).is_some()).collect();
    if can_have.is_empty() {
        return (0, Vec::new());
    }
    let faulty = {
        let (source, matrices) = (source.clone(), matrices.clone());
        move |name: &str| -> Result<Weight, CheckpointError> {
            let weight = source(name)?;
            Ok(if matrices.contains(name) { fault(&weight).unwrap_or(weight) } else { weight })
        }
    };
    let mut engines = engines(bundle, false);
    let check = LinearCheck::watch(&mut engines, faulty);
    engine_parts(&mut engines, &subject.input(), &mut Nowhere, &mut |_| {}).unwrap();
    let results = check.finish().unwrap();
    let passed = results.iter().filter(|tap| tap.verdict == Verdict::Pass);
    let passed = passed.filter(|tap| can_have.iter().any(|name| tap.name.ends_with(name.as_str())));
    (can_have.len(), passed.map(|tap| tap.name.clone()).collect())
}

#[test]
fn every_fault_is_found_in_every_matrix() {
    let mut had = [0; FAULTS.len()];
    let mut unseen_anywhere = Vec::new();
    for subject in one_of_each() {
        // Of fp16 that is not emulated the runtime leaves roundings out: what they may make is as much as some faults make
        // in a single row.
        let strict = |recipe: &Recipe| recipe.emulated || QUANTIZED.contains(&recipe.precision);
        let mut recipes = recipes(&subject, Target::Portable);
        recipes.retain(strict);
        for recipe in recipes {
            let row = format!("{} {}, emulated: {}", subject.name, recipe.precision, recipe.emulated);
            let bundle = subject.exported(recipe, Target::Portable);
            for ((name, fault), had) in FAULTS.into_iter().zip(&mut had) {
                let (can_have, unseen) = unseen(&subject, &bundle, fault);
                *had += can_have;
                if !unseen.is_empty() {
                    unseen_anywhere.push(format!("{row}: {name}, and nobody sees it in {unseen:?}"));
                }
            }
        }
    }
    assert!(unseen_anywhere.is_empty(), "{}", unseen_anywhere.join("\n"));
    for ((name, _), had) in FAULTS.iter().zip(had) {
        assert!(had > 0, "no matrix can have the fault: {name}");
    }
}

/// Where nothing is rounded on the way, a fault in one block of one matrix shows in the whole.
#[test]
fn a_block_whose_scale_is_off_shows_in_what_the_model_computes() {
    let subject = plain("C");
    for precision in [Precision::WeightInt8, Precision::WeightInt4] {
        let bundle = subject.exported(Recipe::of(precision), Target::Portable);
        let source = weights_of(&bundle);
        for faulty in [false, true] {
            let planted = |name: &str| {
                let weight = source(name)?;
                let one_block = |row, column, _, w: f32| if row == 3 && column < 8 { w * 1.02 } else { w };
                let here = faulty && name == "model.layers.1.mlp.down_proj.weight";
                Ok::<_, CheckpointError>(if here { changed(&weight, one_block) } else { weight })
            };
            let reference = transformer::load(bundle.architecture(), planted).unwrap();
            let ids = subject.input().ids;
            let findings =
                compare_plain(&mut engines(&bundle, false), reference.as_ref(), ids, &[], Detail::All, &mut |_| {});
            let failed: Vec<String> = findings
                .unwrap()
                .taps
                .into_iter()
                .filter(|tap| tap.verdict == Verdict::Fail)
                .map(|tap| tap.name)
                .collect();
            assert_eq!(
                failed.first().map(String::as_str),
                faulty.then_some("layers.1.mlp.out"),
                "{precision}: {failed:?}"
            );
        }
    }
}
