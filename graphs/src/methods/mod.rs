//! One file per method: the graphs that the host code walks a plan over.

pub mod homer;
pub mod plain;
pub mod significance;

use crate::architecture::Llama;
use crate::blocks::Target;
use crate::onnx::Scope;
use crate::weights::WeightIndex;
use std::rc::Rc;

/// What every graph of a method is built from.
#[derive(Clone)]
pub struct Source {
    /// The model.
    pub arch: Llama,
    /// Its tensors.
    pub weights: Rc<WeightIndex>,
    /// What runtime the graphs are for.
    pub target: Target,
}

impl Source {
    fn graph(&self, name: &str) -> Scope {
        Scope::new(name, Rc::clone(&self.weights))
    }
}
