//! From bundles in any precision to the nodes that are wrong by themselves: part by part on the reference's values, in the
//! order of the computation, and inside every part the linear layers one by one, on the rows that the part gives them.
//!
//! Where activations are rounded, two right computations of a whole model drift apart further than a fault of some percent
//! does, so that halving a whole finds nothing; between two points nothing drifts.

use super::BisectError;
use super::case::{Case, Visit, decides};
use super::culprit::{Found, Origin, WrongPart};
use super::steps::{JudgedLinear, Outcome, Steps, in_type, linears_of, points};
use super::terms::Terms;
use crate::reference::to_tensor;
use crate::runtime::{EngineError, Loader};
use crate::verify::linears::matrix;
use crate::verify::verdict::Verdict;
use accordion_graphs::onnx::{PartNode, Point};
use ndarray::Axis;
use std::collections::BTreeSet;
use std::ops::ControlFlow;

/// Looks for the first part of the first one of `cases` that is wrong by `terms`, with engines of `loader`. `on_case` hears how
/// many turned out right. `None` if all did.
///
/// # Errors
///
/// A case cannot be made, or a part of a graph not be loaded or run.
pub fn first_wrong(
    loader: &dyn Loader,
    terms: &Terms<'_>,
    on_case: &mut dyn FnMut(usize),
    cases: impl FnOnce(&mut Visit<'_>) -> Result<ControlFlow<()>, BisectError>,
) -> Result<Option<Found>, BisectError> {
    let mut steps = Steps::new(loader, terms);
    let (mut found, mut right) = (None, 0);
    let _ended = cases(&mut |case| {
        found = wrong_part(&mut steps, terms, case)?;
        right += 1;
        on_case(right);
        Ok(if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(found)
}

fn wrong_part(steps: &mut Steps<'_>, terms: &Terms<'_>, case: &Case<'_>) -> Result<Option<Found>, BisectError> {
    let points = points(case);
    // Nodes of parts that came out right.
    let mut acquitted: BTreeSet<usize> = BTreeSet::new();
    for (at, point) in points.iter().enumerate() {
        let Some(outcome) = steps.run(case, &points, point)? else { continue };
        if let Some(linear) = outcome.linears.iter().find(|linear| linear.result.verdict == Verdict::Fail) {
            return of_linear(linear, terms, case, (&points, point), steps.runs).map(Some);
        }
        match outcome.result.verdict {
            Verdict::Fail => {
                let suspects = suspects(steps, case, (&points, at), &outcome, acquitted)?;
                return Ok(Some(of_part(outcome, &suspects, terms, case, (&points, point), steps.runs)));
            }
            // One node computes a choice and what follows from it.
            Verdict::Ambiguous if decides(&point.name) => return Ok(None),
            Verdict::Ambiguous | Verdict::Pass => acquitted.extend(outcome.part.nodes.iter().map(|node| node.index)),
        }
    }
    Ok(None)
}

/// The nodes of the wrong part of point `at` that nothing speaks for: no linear layer that is right by itself, and no part
/// beside that came out right; of those that came out wrong too, what they have in common.
fn suspects(
    steps: &mut Steps<'_>,
    case: &Case<'_>,
    (points, at): (&[Point], usize),
    wrong: &Outcome,
    mut acquitted: BTreeSet<usize>,
) -> Result<Vec<PartNode>, BisectError> {
    let scope = &case.graph.scope;
    for layer in linears_of(case, &wrong.part) {
        let linear = scope.part(&layer.product, &BTreeSet::from([layer.rows.as_str()]));
        acquitted.extend(linear.into_iter().flat_map(|linear| linear.nodes).map(|node| node.index));
    }
    let given: BTreeSet<&str> = points.iter().map(|point| point.value.name.as_str()).collect();
    let mut suspects: Vec<PartNode> =
        wrong.part.nodes.iter().filter(|node| !acquitted.contains(&node.index)).cloned().collect();
    for other in &points[at + 1..] {
        let Some(beside) = scope.part(&other.value.name, &given) else { continue };
        let shared = |node: &PartNode| beside.nodes.iter().any(|known| known.index == node.index);
        if suspects.len() <= 1 || !suspects.iter().any(shared) {
            continue;
        }
        let Some(outcome) = steps.run(case, points, other)? else { continue };
        let left: Vec<PartNode> = match outcome.result.verdict {
            Verdict::Fail => suspects.iter().filter(|node| shared(node)).cloned().collect(),
            Verdict::Pass => suspects.iter().filter(|node| !shared(node)).cloned().collect(),
            Verdict::Ambiguous => continue,
        };
        if !left.is_empty() {
            suspects = left;
        }
    }
    Ok(if suspects.is_empty() { wrong.part.nodes.clone() } else { suspects })
}

/// The nodes between the rows of `linear` and their product, on rows whose rounding leaves no choice.
fn of_linear(
    linear: &JudgedLinear,
    terms: &Terms<'_>,
    case: &Case<'_>,
    (points, point): (&[Point], &Point),
    runs: usize,
) -> Result<Found, BisectError> {
    let (layer, rows) = (terms.layer(&linear.layer)?, matrix(&linear.rows)?);
    let leeway = layer.leeway(&rows);
    let mut sure: Vec<usize> = (0..rows.nrows()).filter(|&row| leeway.row(row).iter().all(|by| *by <= 0.0)).collect();
    if sure.is_empty() {
        sure.extend(0..rows.nrows());
    }
    let rows = rows.select(Axis(0), &sure);
    let expected = to_tensor(&layer.apply(&rows))?;
    let name = linear.layer.rows.clone();
    let part = case.graph.scope.part(&linear.layer.product, &BTreeSet::from([name.as_str()]));
    let Some(part) = part else {
        let (graph, name) = (case.graph.name.clone(), linear.layer.product.clone());
        return Err(EngineError::UnknownName { graph, kind: "output", name }.into());
    };
    let inputs = vec![(name, in_type(&to_tensor(&rows)?, linear.rows.dtype())?)];
    let wrong = WrongPart {
        tap: point.name.clone(),
        matrix: Some(linear.layer.matrix.clone()),
        result: linear.result.clone(),
        origin: Origin::Nodes,
        part: &part,
        suspects: &part.nodes,
        inputs: &inputs,
    };
    let culprit = wrong.culprit(case, points, runs);
    Ok(Found { culprit, part, inputs, expected, bounds: terms.linear_bounds() })
}

/// A part whose linear layers are right by themselves.
fn of_part(
    outcome: Outcome,
    suspects: &[PartNode],
    terms: &Terms<'_>,
    case: &Case<'_>,
    (points, point): (&[Point], &Point),
    runs: usize,
) -> Found {
    let Outcome { part, inputs, shape, result, .. } = outcome;
    let (tap, origin) = (point.name.clone(), Origin::Nodes);
    let expected = &case.expected[&tap];
    let expected = expected.reshaped(shape).unwrap_or_else(|_| expected.clone());
    let bounds = terms.bounds(&tap);
    let wrong = WrongPart { tap, matrix: None, result, origin, part: &part, suspects, inputs: &inputs };
    let culprit = wrong.culprit(case, points, runs);
    Found { culprit, part, inputs, expected, bounds }
}
