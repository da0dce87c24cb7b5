//! The parts of graphs between one point and those before it, each by itself on the reference's values.

use super::BisectError;
use super::case::Case;
use super::terms::Terms;
use crate::runtime::{Engine, EngineError, Loader};
use crate::tensor::{Tensor, TensorError};
use crate::verify::linears::judge_product;
use crate::verify::verdict::TapResult;
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{Part, Point, QuantizedLinear, ValueInfo, tap_outputs};
use half::{bf16, f16};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// The parts of all graphs, each loaded once, whatever the number of cases.
pub(super) struct Steps<'l> {
    loader: &'l dyn Loader,
    terms: &'l Terms<'l>,
    loaded: HashMap<(String, String), Option<Step>>,
    pub(super) runs: usize,
}

struct Step {
    part: Part,
    /// Linear layers inside that were not judged yet.
    linears: Vec<QuantizedLinear>,
    engine: Box<dyn Engine>,
}

/// What a part made of the reference's values.
pub(super) struct Outcome {
    pub(super) part: Part,
    pub(super) inputs: Vec<(String, Tensor)>,
    /// The shape of what it computed.
    pub(super) shape: Vec<usize>,
    /// That, judged.
    pub(super) result: TapResult,
    /// The linear layers inside, on the rows that the part itself gave them; each once for all cases of a graph.
    pub(super) linears: Vec<JudgedLinear>,
}

/// A linear layer of a graph.
pub(super) struct JudgedLinear {
    pub(super) layer: QuantizedLinear,
    pub(super) rows: Tensor,
    pub(super) result: TapResult,
}

/// The points of `case` that the reference has values for.
pub(super) fn points(case: &Case<'_>) -> Vec<Point> {
    case.graph.scope.points().into_iter().filter(|point| case.expected.contains_key(&point.name)).collect()
}

impl<'l> Steps<'l> {
    pub(super) fn new(loader: &'l dyn Loader, terms: &'l Terms<'l>) -> Self {
        Self { loader, terms, loaded: HashMap::new(), runs: 0 }
    }

    /// Runs the nodes of `case` between `point` and those of `points` before it. `None` where there are none.
    pub(super) fn run(
        &mut self,
        case: &Case<'_>,
        points: &[Point],
        point: &Point,
    ) -> Result<Option<Outcome>, BisectError> {
        let terms = self.terms;
        let key = (case.graph.name.clone(), point.value.name.clone());
        let step = match self.loaded.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Step::load(self.loader, case, points, point, terms.linears)?)
            }
        };
        let Some(step) = step else { return Ok(None) };
        let inputs: Vec<(String, Tensor)> = step
            .part
            .reads
            .iter()
            .map(|read| Ok((read.name.clone(), given(case, points, read)?)))
            .collect::<Result<_, BisectError>>()?;
        let read = |name: &str| inputs.iter().find(|(input, _)| input == name).map(|(_, value)| value);
        let mut wanted = vec![step.part.wanted.as_str()];
        let inside = step.linears.iter().flat_map(|linear| [linear.rows.as_str(), linear.product.as_str()]);
        for name in inside.filter(|name| read(name).is_none()) {
            if !wanted.contains(&name) {
                wanted.push(name);
            }
        }
        let passed: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
        let values = step.engine.run(&passed, &mut [], &wanted)?;
        self.runs += 1;
        let value = |name: &str| {
            let computed = wanted.iter().position(|known| *known == name).and_then(|at| values.get(at));
            computed.or_else(|| read(name))
        };
        let Some(found) = values.first() else { return Ok(None) };
        let Some(result) = terms.judge(case, &point.name, found) else { return Ok(None) };
        let shape = found.shape().to_vec();
        let mut linears = Vec::with_capacity(step.linears.len());
        for layer in &step.linears {
            let (Some(rows), Some(product)) = (value(&layer.rows), value(&layer.product)) else { continue };
            let name = format!("linears.{}.{}", case.graph.name, layer.matrix);
            let result = judge_product(&name, &terms.layer(layer)?, [rows, product], &terms.linear_bounds())?;
            linears.push(JudgedLinear { layer: layer.clone(), rows: rows.clone(), result });
        }
        let part = step.part.clone();
        step.linears.clear();
        Ok(Some(Outcome { part, inputs, shape, result, linears }))
    }
}

impl Step {
    fn load(
        loader: &dyn Loader,
        case: &Case<'_>,
        points: &[Point],
        point: &Point,
        with_linears: bool,
    ) -> Result<Option<Self>, BisectError> {
        let graph = case.graph;
        let before: BTreeSet<&str> = points.iter().map(|point| point.value.name.as_str()).collect();
        let Some(part) = graph.scope.part(&point.value.name, &before) else { return Ok(None) };
        let linears = if with_linears { linears_of(case, &part) } else { Vec::new() };
        let cut = graph.scope.cut(&part, graph.bundle.weights().index())?.finish(graph.locations)?;
        let mut bytes = cut.bytes;
        let is_read = |name: &str| part.reads.iter().any(|read| read.name == name);
        let inside: BTreeSet<&str> = linears
            .iter()
            .flat_map(|linear| [linear.rows.as_str(), linear.product.as_str()])
            .filter(|name| *name != part.wanted && !is_read(name))
            .collect();
        if !inside.is_empty() {
            bytes.extend(tap_outputs(&inside.into_iter().collect::<Vec<_>>()));
        }
        let engine = loader.load(&graph.name, &bytes, &cut.signature.weights)?;
        Ok(Some(Self { part, linears, engine }))
    }
}

/// The linear layers that `part` computes as a whole.
pub(super) fn linears_of(case: &Case<'_>, part: &Part) -> Vec<QuantizedLinear> {
    let computes = |name: &String| part.nodes.iter().any(|node| node.needed.contains(name));
    let reads = |name: &String| part.reads.iter().any(|read| read.name == *name);
    let layers = case.graph.scope.linear_layers().into_iter();
    layers.filter(|layer| computes(&layer.product) && (computes(&layer.rows) || reads(&layer.rows))).collect()
}

/// What the reference has for the value `read`, in its shape and type.
fn given(case: &Case<'_>, points: &[Point], read: &ValueInfo) -> Result<Tensor, BisectError> {
    if let Some((_, tensor)) = case.inputs.iter().find(|(input, _)| *input == read.name) {
        return Ok(tensor.clone());
    }
    let point = points.iter().find(|point| point.value.name == read.name);
    let Some(expected) = point.and_then(|point| case.expected.get(&point.name)) else {
        let graph = case.graph.name.clone();
        return Err(EngineError::UnknownName { graph, kind: "input", name: read.name.clone() }.into());
    };
    Ok(in_type(&expected.reshaped(shape_in_graph(expected.shape(), read.shape.len()))?, read.dtype)?)
}

/// `tensor` in the 16-bit numbers `dtype`; as it is where that is none.
pub(super) fn in_type(tensor: &Tensor, dtype: DType) -> Result<Tensor, TensorError> {
    match dtype {
        half if half == tensor.dtype() => Ok(tensor.clone()),
        DType::F16 => {
            let halves: Vec<f16> = tensor.to_f32().into_iter().map(f16::from_f32).collect();
            Tensor::from_storage(DType::F16, tensor.shape(), Arc::new(halves), 0)
        }
        DType::Bf16 => {
            let halves: Vec<bf16> = tensor.to_f32().into_iter().map(bf16::from_f32).collect();
            Tensor::from_storage(DType::Bf16, tensor.shape(), Arc::new(halves), 0)
        }
        _ => Ok(tensor.clone()),
    }
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
