//! One file per method: the graphs that the host code walks a plan over.

pub mod homer;
mod layers;
pub mod plain;
pub mod rcc;
pub mod sharedllm;
pub mod significance;
pub mod step;

use crate::architecture::Architecture;
use crate::blocks::{Target, Transformer};
use crate::onnx::Scope;
use crate::weights::WeightIndex;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The graphs of a method, by name.
pub type Graphs = BTreeMap<String, Scope>;

/// What every graph of a method is built from.
#[derive(Clone)]
pub struct Source {
    /// The decoder.
    pub arch: Architecture,
    /// Its tensors.
    pub weights: Rc<WeightIndex>,
    /// What runtime the graphs are for.
    pub target: Target,
}

impl Source {
    fn graph(&self, name: &str) -> Scope {
        Scope::new(name, Rc::clone(&self.weights))
    }

    fn decoder(&self) -> Transformer<'_> {
        Transformer::decoder(&self.arch, self.target)
    }
}
