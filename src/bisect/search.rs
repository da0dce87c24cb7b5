//! From a wrong output to the nodes that went wrong.
//!
//! Every run declares one value an output besides the graph's own, so that the runtime may fuse what it always fuses. Half
//! by half the first wrong point is found in as many runs as the number of points has binary digits. That takes for granted
//! that what follows from something wrong is wrong, which a graph need not do: so the points that the found one is
//! computed from are looked at too, a run for each, and as long as one of them is wrong the search goes on there. It ends
//! at a point that is wrong although all it is computed from is right.
//!
//! The nodes between are told apart by the points beside: a node that one of these needs too, and that comes out right, is
//! not to blame (of a node with several results: for what the point needs of it); and of several wrong ones, what they have
//! in common is. At last the nodes alone are run on the reference's values: if they are right then, it is what had gathered
//! before them that made them wrong.
//!
//! All that rests on bounds that hold for a whole computation. In precisions that round activations there are none so
//! narrow: there [`super::by_part`] looks.

use super::BisectError;
use super::case::{Case, Visit, bounds, decides};
use super::culprit::{Found, Origin, WrongPart};
use crate::runtime::{EngineError, Loader};
use crate::tensor::Tensor;
use crate::verify::judge::is_score;
use crate::verify::verdict::{TapResult, Verdict};
use accordion_graphs::onnx::{Part, PartNode, Point};
use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;

/// A point vouches for the nodes it needs if it uses no more of its bounds than this: rounding uses a hundredth.
const CLEARLY_RIGHT: f64 = 0.1;

/// Looks for the first wrong point of the first wrong one of `cases`, with engines of `loader`. `on_case` hears how many turned
/// out right. `None` if all did.
///
/// # Errors
///
/// A case cannot be made, or a graph or a part of it not be loaded or run.
pub fn first_wrong(
    loader: &dyn Loader,
    on_case: &mut dyn FnMut(usize),
    cases: impl FnOnce(&mut Visit<'_>) -> Result<ControlFlow<()>, BisectError>,
) -> Result<Option<Found>, BisectError> {
    let (mut found, mut right) = (None, 0);
    let _ended = cases(&mut |case| {
        found = bisect(case, loader)?;
        right += 1;
        on_case(right);
        Ok(if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(found)
}

/// Looks for the first wrong point of `case` with engines of `loader`. `None` if every output is right.
///
/// # Errors
///
/// The graph, or a part of it, cannot be loaded or run.
fn bisect(case: &Case<'_>, loader: &dyn Loader) -> Result<Option<Found>, BisectError> {
    let points =
        case.graph.scope.points().into_iter().filter(|point| case.expected.contains_key(&point.name)).collect();
    let mut search = Search { case, loader, points, checked: HashMap::new(), runs: 0 };
    search.check_outputs()?;
    let Some(wrong) = search.first_wrong()? else {
        return Ok(None);
    };
    let part = search.part(wrong)?;
    let suspects = search.suspects(wrong, &part)?;
    search.found(wrong, part, &suspects).map(Some)
}

struct Checked {
    result: TapResult,
    shape: Vec<usize>,
}

impl Checked {
    fn is_wrong(&self) -> bool {
        self.result.verdict == Verdict::Fail
    }

    fn is_clearly_right(&self) -> bool {
        self.result.verdict == Verdict::Pass && self.result.bound_use.is_some_and(|used| used <= CLEARLY_RIGHT)
    }
}

struct Search<'a, 'r> {
    case: &'a Case<'r>,
    loader: &'a dyn Loader,
    /// What the reference has values for, in the order of the computation.
    points: Vec<Point>,
    checked: HashMap<usize, Checked>,
    runs: usize,
}

impl Search<'_, '_> {
    /// Judges all outputs in one run, and what is decided inside the graph with the scores it is decided by: a wrong score need
    /// not change what it decides. What follows from a near-tie that was decided differently is left out.
    fn check_outputs(&mut self) -> Result<(), BisectError> {
        let outputs = &self.case.graph.model.signature.outputs;
        let is_output = |point: &Point| outputs.iter().any(|output| output.name == point.value.name);
        let looked_at = |point: &Point| is_output(point) || decides(&point.name) || is_score(&point.name);
        let (places, points): (Vec<usize>, Vec<&Point>) =
            self.points.iter().enumerate().filter(|(_, point)| looked_at(point)).unzip();
        let names: Vec<&str> = points.iter().map(|point| point.value.name.as_str()).collect();
        let inside: Vec<&str> =
            points.iter().filter(|point| !is_output(point)).map(|point| point.value.name.as_str()).collect();
        let values = self.case.run(self.case.load(self.loader, &inside)?.as_mut(), &names)?;
        self.runs += 1;
        for (at, value) in places.into_iter().zip(values) {
            self.note(at, &value);
        }
        let is_tie =
            |at: &usize| decides(&self.points[*at].name) && self.checked[at].result.verdict == Verdict::Ambiguous;
        if let Some(tie) = self.checked.keys().copied().filter(is_tie).min() {
            self.points.truncate(tie);
            self.checked.retain(|&i, _| i < tie);
        }
        Ok(())
    }

    fn note(&mut self, at: usize, value: &Tensor) {
        if let Some(result) = self.case.judge(&self.points[at].name, value) {
            self.checked.insert(at, Checked { result, shape: value.shape().to_vec() });
        }
    }

    /// Judges point `at`, in a run of its own if it was not judged yet.
    fn check(&mut self, at: usize) -> Result<&Checked, BisectError> {
        if !self.checked.contains_key(&at) {
            let name = self.points[at].value.name.clone();
            let mut engine = self.case.load(self.loader, &[&name])?;
            let values = self.case.run(engine.as_mut(), &[&name])?;
            self.runs += 1;
            if let Some(value) = values.first() {
                self.note(at, value);
            }
        }
        // Every point has an expected value, and every run yields what it is asked for.
        self.checked.get(&at).ok_or_else(|| self.absent(at))
    }

    /// A point that is wrong although all it is computed from is right.
    fn first_wrong(&mut self) -> Result<Option<usize>, BisectError> {
        let outputs = self.checked.iter().filter(|(_, checked)| checked.is_wrong()).map(|(&i, _)| i).min();
        let mut wrong = match (outputs, self.points.len()) {
            (Some(output), _) => output,
            // Outputs that follow from a near-tie say nothing: what is before it has to.
            (None, n) if n > 0 && self.check(n - 1)?.is_wrong() => n - 1,
            _ => return Ok(None),
        };
        let mut unknown = 0..wrong;
        while !unknown.is_empty() {
            let middle = unknown.start.midpoint(unknown.end);
            if self.check(middle)?.is_wrong() {
                wrong = middle;
                unknown.end = middle;
            } else {
                unknown.start = middle + 1;
            }
        }
        while let Some(before) = self.wrong_read(wrong)? {
            wrong = before;
        }
        Ok(Some(wrong))
    }

    /// The first wrong one of the points that point `at` is computed from.
    fn wrong_read(&mut self, at: usize) -> Result<Option<usize>, BisectError> {
        let part = self.part(at)?;
        for read in self.points_of(&part) {
            if self.check(read)?.is_wrong() {
                return Ok(Some(read));
            }
        }
        Ok(None)
    }

    /// The nodes between point `at` and the points before it.
    fn part(&self, at: usize) -> Result<Part, BisectError> {
        let given = self.points.iter().map(|point| point.value.name.as_str()).collect();
        self.part_from(at, &given)
    }

    fn part_from(&self, at: usize, given: &BTreeSet<&str>) -> Result<Part, BisectError> {
        self.case.graph.scope.part(&self.points[at].value.name, given).ok_or_else(|| self.absent(at))
    }

    /// Point `at` is not in the graph.
    fn absent(&self, at: usize) -> BisectError {
        let (graph, name) = (self.case.graph.name.clone(), self.points[at].value.name.clone());
        EngineError::UnknownName { graph, kind: "output", name }.into()
    }

    /// The points among what `part` reads, in the order of the computation.
    fn points_of(&self, part: &Part) -> Vec<usize> {
        let reads = |point: &Point| part.reads.iter().any(|read| read.name == point.value.name);
        (0..self.points.len()).filter(|&i| reads(&self.points[i])).collect()
    }

    /// The nodes of `part`, which computes the wrong point `wrong`, that the points beside it leave to blame.
    fn suspects(&mut self, wrong: usize, part: &Part) -> Result<Vec<PartNode>, BisectError> {
        let (mut acquitted, mut common): (BTreeSet<String>, Vec<&PartNode>) =
            (BTreeSet::new(), part.nodes.iter().collect());
        for other in (0..self.points.len()).filter(|&other| other != wrong) {
            let beside = self.part(other)?;
            let suspects = left_to_blame(&part.nodes, &acquitted);
            if suspects.len() <= 1 {
                break;
            }
            let right = |read: usize| self.checked.get(&read).is_some_and(|checked| !checked.is_wrong());
            let given_right_values = self.points_of(&beside).into_iter().all(right);
            // What comes before and is right can acquit; what comes after can accuse too, if it was given the right values.
            let worth_a_run = if other < wrong {
                let needed: BTreeSet<&String> = beside.nodes.iter().flat_map(|node| &node.needed).collect();
                let mut values = suspects.iter().flat_map(|suspect| &suspect.needed);
                values.any(|value| needed.contains(value) && !acquitted.contains(value))
            } else {
                given_right_values && suspects.iter().any(|s| beside.nodes.iter().any(|node| node.index == s.index))
            };
            if !worth_a_run {
                continue;
            }
            let checked = self.check(other)?;
            if checked.is_wrong() && given_right_values {
                common.retain(|suspect| beside.nodes.iter().any(|node| node.index == suspect.index));
            } else if checked.is_clearly_right() {
                acquitted.extend(beside.nodes.into_iter().flat_map(|node| node.needed));
            }
        }
        let suspects = left_to_blame(&part.nodes, &acquitted);
        let both = suspects.iter().copied().filter(|node| common.contains(node)).collect();
        let choices: [Vec<&PartNode>; 2] = [both, suspects];
        let chosen = choices.into_iter().find(|nodes| !nodes.is_empty());
        Ok(chosen.map_or_else(|| part.nodes.clone(), |nodes| nodes.into_iter().cloned().collect()))
    }

    /// Runs the nodes of `part` on the reference's values, and tells everything about them.
    fn found(mut self, wrong: usize, part: Part, suspects: &[PartNode]) -> Result<Found, BisectError> {
        let graph = self.case.graph;
        let inputs = self.values(&part)?;
        let cut = graph.scope.cut(&part, graph.bundle.weights().index())?.finish(graph.locations)?;
        let mut engine = self.loader.load(&graph.name, &cut.bytes, &cut.signature.weights)?;
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
        let values = engine.run(&given, &mut [], &[&part.wanted])?;
        self.runs += 1;
        let tap = self.points[wrong].name.clone();
        let alone = values.first().and_then(|value| self.case.judge(&tap, value));
        let origin = match alone {
            Some(TapResult { verdict: Verdict::Fail, .. }) => Origin::Nodes,
            _ => Origin::Accumulated,
        };
        let Checked { result, shape } = self.checked.remove(&wrong).ok_or_else(|| self.absent(wrong))?;
        let wrong_part = WrongPart { tap, matrix: None, result, origin, part: &part, suspects, inputs: &inputs };
        let culprit = wrong_part.culprit(self.case, &self.points, self.runs);
        // Where the nodes alone are right, only all that is before them shows the difference.
        let (part, inputs) = match origin {
            Origin::Nodes => (part, inputs),
            Origin::Accumulated => {
                let all = self.part_from(wrong, &BTreeSet::new())?;
                let inputs = self.values(&all)?;
                (all, inputs)
            }
        };
        let expected = self.expected(wrong, &shape);
        let bounds = bounds(&culprit.tap);
        Ok(Found { culprit, part, inputs, expected, bounds })
    }

    /// What `part` reads, as the reference has it.
    fn values(&self, part: &Part) -> Result<Vec<(String, Tensor)>, BisectError> {
        let value = |name: &str| {
            if let Some((_, tensor)) = self.case.inputs.iter().find(|(input, _)| input == name) {
                return Some(tensor.clone());
            }
            let at = self.points.iter().position(|point| point.value.name == name)?;
            Some(self.expected(at, &self.checked.get(&at)?.shape))
        };
        let named = part.reads.iter().map(|read| (read.name.clone(), value(&read.name)));
        named
            .map(|(name, value)| {
                let Some(value) = value else {
                    let graph = self.case.graph.name.clone();
                    return Err(EngineError::UnknownName { graph, kind: "input", name }.into());
                };
                Ok((name, value))
            })
            .collect()
    }

    /// The reference's value of point `at`, in the graph's `shape` if it has as many elements.
    fn expected(&self, at: usize, shape: &[usize]) -> Tensor {
        let value = &self.case.expected[&self.points[at].name];
        value.reshaped(shape).unwrap_or_else(|_| value.clone())
    }
}

/// The nodes that compute something else than the values `acquitted`.
fn left_to_blame<'p>(nodes: &'p [PartNode], acquitted: &BTreeSet<String>) -> Vec<&'p PartNode> {
    nodes.iter().filter(|node| node.needed.iter().any(|value| !acquitted.contains(value))).collect()
}
