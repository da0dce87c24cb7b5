//! Graphs inside nodes: the bodies of loops.

use super::{Attribute, BuildError, Dim, Scope, Value};
use crate::dtype::DType;
use onnx_protobuf::GraphProto;

/// A graph that a node carries as an attribute. It stands by itself: everything it reads comes in through its inputs, and
/// it has standard operators only.
#[derive(Debug, Clone, PartialEq)]
pub struct Subgraph(Box<GraphProto>);

impl Subgraph {
    /// Of a graph that was built with its inputs and outputs declared.
    fn new(body: &Scope) -> Result<Self, BuildError> {
        if let Some(error) = body.take_error() {
            return Err(error);
        }
        let graph = body.graph.borrow();
        if !graph.linked.is_empty() || graph.nodes.iter().any(|node| !node.domain.is_empty()) {
            let problem = "the body of a loop has weights, or operators that are not standard".to_owned();
            return Err(BuildError { scope: graph.name.clone(), problem });
        }
        Ok(Self(Box::new(graph.to_proto())))
    }

    pub(super) fn proto(&self) -> &GraphProto {
        &self.0
    }
}

/// What a step of a loop leaves: the state for the next one, and its row of every result.
pub struct Step {
    /// As many as came in, with their shapes.
    pub state: Vec<Value>,
    /// What is stacked along the loop's axis.
    pub results: Vec<Value>,
}

impl Scope {
    /// A loop over `axis` of all `sequences`, from `state`: `step` is given a scope of its own, the state, and an element of
    /// every sequence without that axis. Returns the last state, and the results with the axis.
    ///
    /// # Errors
    ///
    /// As any operator: kept in the scope.
    pub fn scan(
        &self,
        state: &[&Value],
        sequences: &[&Value],
        axis: usize,
        step: impl FnOnce(&Scope, &[Value], &[Value]) -> Step,
    ) -> Step {
        let body = self.inside("step");
        let mut names = (0..).map(|i| format!("in.{i}"));
        let mut input = |dtype: DType, shape: &[Dim]| body.input(&names.next().unwrap_or_default(), dtype, shape);
        let before: Vec<Value> = state.iter().map(|v| input(v.dtype(), v.shape())).collect();
        let elements: Vec<Value> = sequences.iter().map(|v| input(v.dtype(), &without(v.shape(), axis))).collect();
        let after = step(&body, &before, &elements);
        let unchanged =
            after.state.len() == state.len() && after.state.iter().zip(state).all(|(a, b)| a.shape() == b.shape());
        if !unchanged {
            self.fail(format!("a loop with the state {state:?} leaves {:?}", after.state));
        }
        let outputs: Vec<&Value> = after.state.iter().chain(&after.results).collect();
        for (i, value) in outputs.iter().enumerate() {
            body.output(&format!("out.{i}"), value);
        }
        let Some(extent) = sequences.first().map(|v| v.dim(axis)) else {
            self.fail("a loop over no sequence");
            return after;
        };
        let results = outputs.iter().enumerate().map(|(i, value)| {
            let mut shape = value.shape().to_vec();
            if i >= state.len() {
                shape.insert(axis.min(shape.len()), extent.clone());
            }
            (value.dtype(), shape)
        });
        let results = results.collect();
        let subgraph = match Subgraph::new(&body) {
            Ok(subgraph) => subgraph,
            Err(error) => {
                self.fail(error.to_string());
                return after;
            }
        };
        let axes = |count: usize| Attribute::Ints(vec![axis as i64; count]);
        let attributes = vec![
            ("body", Attribute::Graph(subgraph)),
            ("num_scan_inputs", sequences.len().into()),
            ("scan_input_axes", axes(sequences.len())),
            ("scan_output_axes", axes(after.results.len())),
        ];
        let inputs: Vec<Option<&Value>> = state.iter().chain(sequences).map(|v| Some(*v)).collect();
        let mut outputs = self.node("Scan", &inputs, attributes, results);
        let results = outputs.split_off(state.len());
        Step { state: outputs, results }
    }
}

fn without(shape: &[Dim], axis: usize) -> Vec<Dim> {
    shape.iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, dim)| dim.clone()).collect()
}
