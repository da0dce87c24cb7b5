//! Model-local functions: operators of our own whose bodies are standard operators.

use super::{BuildError, DOMAIN, OPSET, Scope};
use onnx_protobuf::{FunctionProto, OperatorSetIdProto};

/// A function of the domain `ai.accordion`. A runtime that has a kernel of that name uses the kernel, any other one
/// runs the body.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    proto: FunctionProto,
}

impl Function {
    /// The function `name` whose inputs and outputs are those of the graph that `body` was built in.
    ///
    /// # Errors
    ///
    /// The body is inconsistent.
    pub fn new(name: &str, attributes: &[&'static str], body: &Scope) -> Result<Self, BuildError> {
        if let Some(error) = body.take_error() {
            return Err(error);
        }
        let graph = body.graph.borrow();
        let names = |ids: &[usize]| ids.iter().map(|&id| graph.values[id].name.clone()).collect();
        let mut domains: Vec<&str> = graph.nodes.iter().map(|n| n.domain).chain([""]).collect();
        domains.sort_unstable();
        domains.dedup();
        let proto = FunctionProto {
            name: name.to_owned(),
            domain: DOMAIN.to_owned(),
            input: names(&graph.inputs),
            output: names(&graph.outputs),
            attribute: attributes.iter().map(|&a| a.to_owned()).collect(),
            // A function has no initializers: its constants are nodes.
            node: graph.constant_nodes().chain(graph.operator_nodes()).collect(),
            opset_import: domains.into_iter().map(opset).collect(),
            ..FunctionProto::default()
        };
        Ok(Self { proto })
    }

    /// Name of the operator.
    pub fn name(&self) -> &str {
        &self.proto.name
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
