//! Every part of every graph by itself: the nodes between a tap and the taps before it are given the reference's values, so
//! that what is wrong in one place spoils nothing behind it, and every place that is wrong shows.

use super::BisectError;
use super::case::{Case, Visit};
use crate::runtime::{Engine, EngineError, Loader};
use crate::tensor::Tensor;
use crate::verify::{Detail, Findings};
use accordion_graphs::onnx::{Part, Point, ValueInfo};
use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;

/// The nodes that compute one point from the points before it, loaded once for all cases of a graph.
struct Step {
    part: Part,
    engine: Box<dyn Engine>,
}

/// Judges every point of `cases` that `detail` includes, each computed from the reference's values of the points before it.
/// Results are called as their taps, behind the place of their case. `on_case` hears how many cases are done.
///
/// # Errors
///
/// A case cannot be made, or a part of a graph not be loaded or run.
pub fn compare(
    loader: &dyn Loader,
    detail: Detail,
    on_case: &mut dyn FnMut(usize),
    cases: impl FnOnce(&mut Visit<'_>) -> Result<ControlFlow<()>, BisectError>,
) -> Result<Findings, BisectError> {
    let mut steps: HashMap<(String, String), Step> = HashMap::new();
    let (mut findings, mut done) = (Findings::default(), 0);
    let _ended = cases(&mut |case| {
        let graph = case.graph;
        let all = graph.scope.points();
        let points: Vec<&Point> = all.iter().filter(|point| case.expected.contains_key(&point.name)).collect();
        let given: BTreeSet<&str> = points.iter().map(|point| point.value.name.as_str()).collect();
        for point in &points {
            let scope = if case.place.is_empty() { String::new() } else { format!("{}.", case.place) };
            let name = format!("{scope}{}", point.name);
            if !detail.includes(&name) {
                continue;
            }
            let key = (graph.name.clone(), point.value.name.clone());
            let step = match steps.entry(key) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    let Some(part) = graph.scope.part(&point.value.name, &given) else { continue };
                    let cut = graph.scope.cut(&part, graph.bundle.weights().index())?.finish(graph.locations)?;
                    let engine = loader.load(&graph.name, &cut.bytes, &cut.signature.weights)?;
                    entry.insert(Step { part, engine })
                }
            };
            let Some(found) = run(case, step, &points)? else { continue };
            if let Some(mut result) = case.judge(&point.name, &found) {
                result.name = name;
                findings.taps.push(result);
            }
        }
        done += 1;
        on_case(done);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(findings)
}

/// What `step` makes of the reference's values.
fn run(case: &Case<'_>, step: &mut Step, points: &[&Point]) -> Result<Option<Tensor>, BisectError> {
    let value = |read: &ValueInfo| {
        if let Some((_, tensor)) = case.inputs.iter().find(|(input, _)| *input == read.name) {
            return Ok(tensor.clone());
        }
        let point = points.iter().find(|point| point.value.name == read.name);
        let Some(expected) = point.and_then(|point| case.expected.get(&point.name)) else {
            let graph = case.graph.name.clone();
            return Err(EngineError::UnknownName { graph, kind: "input", name: read.name.clone() }.into());
        };
        Ok::<_, BisectError>(expected.reshaped(shape_in_graph(expected.shape(), read.shape.len()))?)
    };
    let inputs: Vec<(&str, Tensor)> = step
        .part
        .reads
        .iter()
        .map(|read| Ok((read.name.as_str(), value(read)?)))
        .collect::<Result<_, BisectError>>()?;
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (*name, value)).collect();
    Ok(step.engine.run(&inputs, &mut [], &[&step.part.wanted])?.pop())
}

/// The `shape` that the reference has in a graph that has it with `rank` axes: it lacks the batch of one that every graph begins
/// with, and keeps apart what a graph has as rows one after the other.
fn shape_in_graph(shape: &[usize], rank: usize) -> Vec<usize> {
    let Some(over) = shape.len().checked_sub(rank) else {
        return [&vec![1; rank - shape.len()], shape].concat();
    };
    if rank == 0 {
        return shape.to_vec();
    }
    let (front, back) = shape.split_at(over + 1);
    [&[front.iter().product()], back].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_added_or_joined_in_front() {
        assert_eq!(shape_in_graph(&[3, 4], 3), [1, 3, 4]);
        assert_eq!(shape_in_graph(&[3, 4], 2), [3, 4]);
        assert_eq!(shape_in_graph(&[2, 3, 4], 2), [6, 4]);
        assert_eq!(shape_in_graph(&[5], 1), [5]);
    }
}
