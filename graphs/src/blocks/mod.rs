//! The pieces of a model, each one a formula: rotary angles, attention, the two halves of a layer.

mod attention;
mod cross_attention;
mod last_row;
mod linear;
mod mamba;
mod nodes;
pub mod rope;
mod transformer;
mod unflatten;

pub use attention::{Attended, CachedRows, LayerCache, Rows};
pub use mamba::Mamba;
pub use nodes::{AttendedNodes, Group, Nodes};
pub use transformer::{Residual, Transformer};
pub use unflatten::unflatten;

use serde::{Deserialize, Serialize};

/// What runtime a graph is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Standard operators only, besides model-local functions of standard operators: any runtime, TensorRT included.
    Portable,
    /// ONNX Runtime's CPU provider: attention and the gated activation become functions that its contributed
    /// operators, or our fused kernels, run faster.
    OrtCpu,
}
