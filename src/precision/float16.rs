//! Bundles in 16-bit floating point: what of them stays in fp32, from rules and from the ranges of a table.

use super::choose::Chosen;
use super::{PrecisionError, Quantization, Recipe, activations, store};
use crate::checkpoint::{Checkpoint, NamedShape};
use crate::staging::Staging;
use accordion_calibration::ranges::{RangeTable, TapRange};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::methods::Graphs;
use accordion_graphs::onnx::Scope;
use accordion_graphs::precision::{Arithmetic, Decision, Keep, Precision, float16};
use accordion_graphs::weights::WeightIndex;
use half::f16;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Other text than that of the table may reach this much further.
const HEADROOM: f32 = 2.0;

/// The largest share of a tap's values that may become zero.
const MAX_LOST: f64 = 0.05;

/// How a bundle computes in 16-bit floating point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rounding {
    /// The format.
    pub format: DType,
    /// Whether the graphs compute in fp32 and round to the format.
    pub emulated: bool,
    /// What decided which parts of the graphs stay in fp32.
    pub decided_by: Basis,
    /// What the rules were overruled by.
    #[serde(default, skip_serializing_if = "Keep::is_empty")]
    pub keep: Keep,
    /// The tensors that are stored in the format.
    pub tensors: BTreeSet<String>,
}

/// What decides which parts of a graph stay in fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// What the parts are.
    Rules,
    /// That, and the ranges of their numbers.
    RulesAndRanges,
}

/// Puts `graphs` into the 16-bit `precision` of `recipe`, as [`super::apply`] says.
pub(super) fn apply(
    recipe: &Recipe,
    format: DType,
    checkpoint: &Checkpoint,
    tensors: &[NamedShape],
    graphs: &Graphs,
    target: Target,
    staging: &mut Staging,
) -> Result<Quantization, PrecisionError> {
    let mut keep = Keep::default();
    let mut ranges = None;
    if let Some(path) = &recipe.ranges {
        let (table, used) = activations::read_table(recipe, path, checkpoint)?;
        if format == DType::F16 {
            keep_ranges(&mut keep, &table);
        }
        ranges = Some(used);
    }
    for word in &recipe.keep {
        let before = keep.matrices.len();
        let named = tensors.iter().filter(|(name, shape)| shape.len() > 1 && name.contains(word.as_str()));
        keep.matrices.extend(named.map(|(name, _)| (name.clone(), "asked for".to_owned())));
        if keep.matrices.len() == before {
            return Err(PrecisionError::UnknownKeep { word: word.clone() });
        }
    }
    let decisions: Vec<Decision> = graphs.values().map(|graph| decide(graph, &keep, target)).collect();
    let mut stored: BTreeMap<&str, bool> = BTreeMap::new();
    for (name, &all) in decisions.iter().flat_map(|decision| &decision.weights) {
        *stored.entry(name).or_insert(true) &= all;
    }
    let rounded = stored.into_iter().filter(|(_, all)| *all).map(|(name, _)| (name.to_owned(), format)).collect();
    let chosen = Chosen { rounded, ..Chosen::default() };
    let index = Rc::new(store::write(checkpoint, tensors, &chosen, staging)?);
    for (graph, decision) in graphs.values().zip(&decisions) {
        float16(graph, decision, Arithmetic { format, emulated: recipe.emulated }, &index);
    }
    let rounding = Rounding {
        format,
        emulated: recipe.emulated,
        decided_by: if ranges.is_some() { Basis::RulesAndRanges } else { Basis::Rules },
        keep,
        tensors: chosen.rounded.into_keys().collect(),
    };
    let kept = decisions.into_iter().flat_map(|decision| decision.kept).collect();
    Ok(Quantization { matrices: BTreeMap::new(), kept, ranges, rounding: Some(rounding) })
}

/// Puts `graphs`, as they are built in fp32, into 16 bits once more: as `rounding` says, over the tensors of `weights`.
pub(super) fn again(rounding: &Rounding, graphs: &Graphs, target: Target, weights: &Rc<WeightIndex>) {
    let arithmetic = Arithmetic { format: rounding.format, emulated: rounding.emulated };
    for graph in graphs.values() {
        float16(graph, &decide(graph, &rounding.keep, target), arithmetic, weights);
    }
}

fn decide(graph: &Scope, keep: &Keep, target: Target) -> Decision {
    match target {
        Target::Portable => Decision::new(graph, keep),
        Target::OrtCpu => Decision::storage(graph, keep),
    }
}

/// The 16-bit format of a precision, if it is one.
pub(super) fn format(precision: Precision) -> Option<DType> {
    match precision {
        Precision::Fp16 => Some(DType::F16),
        Precision::Bf16 => Some(DType::Bf16),
        _ => None,
    }
}

/// Adds what half precision cannot hold of the ranges of `table`.
fn keep_ranges(keep: &mut Keep, table: &RangeTable) {
    for site in table.sites() {
        if let Some(reason) = overflow(site.absmax()) {
            keep.inputs.extend(site.weights().iter().map(|name| (name.clone(), format!("its input {reason}"))));
        }
    }
    for (tap, range) in table.taps() {
        if let Some(reason) = too_wide(range) {
            keep.taps.insert(tap.clone(), format!("tap {tap} {reason}"));
        }
    }
}

fn too_wide(range: &TapRange) -> Option<String> {
    let lost = range.f16_underflow as f64 / range.values.max(1) as f64;
    let too_small = || (lost > MAX_LOST).then(|| format!("has {:.0} % of numbers that become zero", 100.0 * lost));
    overflow(range.absmax).or_else(too_small)
}

fn overflow(absmax: f32) -> Option<String> {
    let max = f16::MAX.to_f32();
    (absmax > max / HEADROOM).then(|| format!("reaches {absmax:.0}, which is too near to the largest fp16, {max:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_half_precision_cannot_hold_is_kept() {
        let range = |absmax, f16_underflow| TapRange { values: 100, absmax, f16_underflow, ..TapRange::default() };
        assert_eq!(too_wide(&range(32_000.0, 5)), None);
        assert!(too_wide(&range(33_000.0, 0)).is_some_and(|reason| reason.starts_with("reaches 33000")));
        assert!(too_wide(&range(1.0, 6)).is_some_and(|reason| reason.contains("6 %")));
    }
}
