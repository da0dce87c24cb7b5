//! RCC's graphs: encoder and slots of one segment after the other, each on what the reference left of those before it; then
//! the decoder over the prompt behind all slots.

use super::BisectError;
use super::case::{Case, Visit};
use super::decoder::{Past, ROWS, continue_from, present};
use super::rebuild::Rebuilt;
use crate::pipeline::rcc::{ENCODER, SLOTS};
use crate::reference::cache::Cache;
use crate::reference::decode::Continuation;
use crate::reference::rcc::Rcc;
use crate::reference::to_tensor;
use crate::tensor::Tensor;
use crate::verify::rcc::RccInput;
use ndarray::{Array2, s};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// The cases of `input`, of which the teacher's tokens are left out.
///
/// # Errors
///
/// The reference cannot be run, the bundle lacks a graph, or `visit` fails.
pub fn cases(
    rebuilt: &Rebuilt<'_>,
    reference: &Rcc,
    input: &RccInput<'_>,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let mut cache = reference.decoder().empty_cache();
    for index in 0..input.plan.segments {
        let place = format!("segments.{index}");
        let ids = input.plan.segment(input.text, index);
        let mut taps = BTreeMap::new();
        let maps = reference.encode(&ids, &mut taps)?;
        if encoder(rebuilt, &place, &ids, &maps, taps, visit)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let before = cache.clone();
        let mut taps = BTreeMap::new();
        reference.fill(&maps, &mut cache, &mut taps)?;
        if slots(rebuilt, &place, &maps, [&before, &cache], taps, visit)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let ids = &input.prompt[..input.prompt.len().min(ROWS)];
    continue_from(rebuilt, reference.decoder(), &Continuation::after(cache), ("prompt", ids), visit)
}

/// The encoder on one segment.
fn encoder(
    rebuilt: &Rebuilt<'_>,
    place: &str,
    ids: &[u32],
    maps: &[Array2<f32>],
    mut expected: BTreeMap<String, Tensor>,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    expected.insert("maps".to_owned(), stacked(maps)?);
    let ids = Tensor::from_i64([1, ids.len()], ids.iter().map(|&id| i64::from(id)).collect())?;
    let graph = rebuilt.graph(ENCODER)?;
    let inputs = vec![("input_ids".to_owned(), ids)];
    visit(&Case { graph: &graph, place: place.to_owned(), inputs, in_place: Vec::new(), expected })
}

/// The decoder's layers over the slots of one segment; `before` and `after` are the caches around it.
fn slots(
    rebuilt: &Rebuilt<'_>,
    place: &str,
    maps: &[Array2<f32>],
    [before, after]: [&Cache; 2],
    mut expected: BTreeMap<String, Tensor>,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let graph = rebuilt.graph(SLOTS)?;
    let (first, rows) = (before.rows(), after.rows() - before.rows());
    let inner = before.layers.len().saturating_sub(1);
    let past = Past::new(graph.bundle.manifest().target, &before.layers[..inner], rows)?;
    let maps = stacked(maps)?;
    let mut inputs = vec![
        ("maps".to_owned(), maps.reshaped([&[1], maps.shape()].concat())?),
        ("position_ids".to_owned(), Tensor::from_i64([1, rows], (first as i64..).take(rows).collect())?),
    ];
    inputs.extend(past.inputs);
    expected.extend(present(&after.layers[..inner])?);
    if let Some(last) = after.layers.get(inner) {
        for (part, all) in [("key", &last.k), ("value", &last.v)] {
            expected.insert(format!("last.{part}"), to_tensor(&all.slice(s![.., first.., ..]))?);
        }
    }
    visit(&Case { graph: &graph, place: place.to_owned(), inputs, in_place: past.in_place, expected })
}

/// The maps that the graphs have, `[L, slots, H]`: what is behind the last layer reaches no token.
fn stacked(maps: &[Array2<f32>]) -> Result<Tensor, BisectError> {
    let live = &maps[..maps.len().saturating_sub(1)];
    let (slots, width) = live.first().map_or((0, 0), Array2::dim);
    let all = live.iter().flatten().copied().collect();
    Ok(Tensor::from_f32([live.len(), slots, width], all)?)
}
