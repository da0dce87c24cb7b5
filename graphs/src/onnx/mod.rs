//! Building ONNX graphs: a scoped builder whose values know their element type and symbolic shape.
//!
//! A [`Scope`] is a place in the module tree; its path is the checkpoint's own prefix (`model.layers.3.self_attn`), so
//! a weight needs no mapping table and every node can be found again in the model. Operators are methods of [`Value`]
//! and never fail on the spot: the first inconsistency is kept, with the scope it happened in, and [`Scope::finish`]
//! returns it. Names matter only when writing; until then values are linked by identity.

mod attribute;
mod cut;
mod function;
mod linears;
mod modules;
mod ops;
mod retype;
mod rewrite;
mod scope;
mod serialize;
mod shape;
mod subgraph;
mod unused;
pub mod wire;

pub use attribute::Attribute;
pub use cut::{Part, PartNode, Point};
pub use function::Operator;
pub use modules::{ModuleNodes, module_path, module_pattern};
pub use retype::Arithmetic;
pub(crate) use retype::{FloatNode, Operand, Ports, Source, Width};
pub(crate) use rewrite::MatrixUse;
pub use rewrite::Uses;
pub use scope::{Scope, Value};
pub use serialize::{GraphSignature, Model, QuantizedLinear, ValueInfo, tap_outputs, typed_outputs};
pub use shape::Dim;
pub(crate) use shape::product;
pub use subgraph::{Step, Subgraph};
pub use unused::without_unused;

/// Opset of the default ONNX domain that all graphs use.
pub const OPSET: i64 = 23;
/// ONNX intermediate representation version: the first with every feature the graphs use.
pub const IR_VERSION: i64 = 10;
/// Domain of the toolkit's own operators.
pub const DOMAIN: &str = "ai.accordion";

/// What is wrong with a graph under construction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("graph construction failed in '{scope}': {problem}")]
pub struct BuildError {
    /// Path of the scope.
    pub scope: String,
    /// What was found and what was expected.
    pub problem: String,
}
