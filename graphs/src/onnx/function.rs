//! Model-local functions: operators of our own whose bodies are standard operators.

use super::{BuildError, DOMAIN, OPSET, Scope};
use onnx_protobuf::{FunctionProto, OperatorSetIdProto};
use std::rc::Rc;

/// An operator of the domain `ai.accordion`, with what builds its body. A runtime that has a kernel of that name uses the
/// kernel, any other one runs the body.
#[derive(Debug)]
pub struct Operator {
    /// Its name.
    pub name: &'static str,
    /// Names of its attributes.
    pub attributes: &'static [&'static str],
    /// Builds the body: the inputs and outputs of the graph are those of the operator.
    pub body: fn(&Scope),
}

/// The model-local function of an [`Operator`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Function {
    proto: FunctionProto,
}

impl Function {
    /// Builds the body of `operator`.
    ///
    /// # Errors
    ///
    /// The body is inconsistent.
    pub(super) fn new(operator: &Operator) -> Result<Self, BuildError> {
        let body = Scope::new(operator.name, Rc::default());
        (operator.body)(&body);
        if let Some(error) = body.take_error() {
            return Err(error);
        }
        let graph = body.graph.borrow();
        let names = |ids: &[usize]| ids.iter().map(|&id| graph.values[id].name.clone()).collect();
        let mut domains: Vec<&str> = graph.nodes.iter().map(|n| n.domain).chain([""]).collect();
        domains.sort_unstable();
        domains.dedup();
        let proto = FunctionProto {
            name: operator.name.to_owned(),
            domain: DOMAIN.to_owned(),
            input: names(&graph.inputs),
            output: names(&graph.outputs),
            attribute: operator.attributes.iter().map(|&a| a.to_owned()).collect(),
            // A function has no initializers: its constants are nodes.
            node: graph.constant_nodes().chain(graph.operator_nodes()).collect(),
            opset_import: domains.into_iter().map(opset).collect(),
            ..FunctionProto::default()
        };
        Ok(Self { proto })
    }

    pub(super) fn proto(&self) -> &FunctionProto {
        &self.proto
    }
}

/// The version of an operator domain that the graphs import.
pub(super) fn opset(domain: &str) -> OperatorSetIdProto {
    let version = if domain.is_empty() { OPSET } else { 1 };
    OperatorSetIdProto { domain: domain.to_owned(), version, ..OperatorSetIdProto::default() }
}
