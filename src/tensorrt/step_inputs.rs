//! What steps are run on: the caches' shape, and where every input of the engine comes from.

use super::execute::{RunError, asked, missing};
use super::loaded::Port;
use super::select::Given;
use crate::cuda::Element;
use crate::runtime::steps::StepCall;
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::GraphSignature;

/// `[batch, groups, capacity, width]` of every cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheShape {
    pub(super) batch: usize,
    pub(super) groups: usize,
    pub(super) capacity: usize,
    pub(super) width: usize,
    pub(super) dtype: DType,
}

impl CacheShape {
    /// That of all of a call's caches.
    pub(super) fn of(call: &StepCall<'_>) -> Result<Self, RunError> {
        let shape = |name: &str, rows: &Tensor| match *rows.shape() {
            [batch, groups, valid, width] if valid <= call.capacity => {
                Ok(Self { batch, groups, capacity: call.capacity, width, dtype: rows.dtype() })
            }
            ref found => Err(format!(
                "cache '{name}' has shape {found:?}, expected [batch, groups, rows, width] with at most {} rows",
                call.capacity
            )),
        };
        let first = call.caches.first().ok_or("there is no cache to append to")?;
        let expected = shape(first.input, first.rows)?;
        for cache in call.caches {
            if shape(cache.input, cache.rows)? != expected {
                return Err(format!("caches '{}' and '{}' are not alike", first.input, cache.input).into());
            }
        }
        Ok(expected)
    }

    /// With another number of rows.
    pub(super) fn with(self, rows: usize) -> [usize; 4] {
        [self.batch, self.groups, rows, self.width]
    }

    /// Bytes of as many rows of one head.
    pub(super) fn bytes(self, rows: usize) -> Result<usize, RunError> {
        let bytes = self.dtype.bytes_of_shape(&[rows, self.width]);
        Ok(bytes.ok_or_else(|| format!("{rows} rows of {} elements are too many", self.width))?)
    }

    pub(super) fn element(self) -> Option<Element> {
        match self.dtype {
            DType::F32 => Some(Element::F32),
            DType::F16 => Some(Element::F16),
            DType::Bf16 => Some(Element::Bf16),
            _ => None,
        }
    }
}

/// Where an input of the engine comes from.
pub(super) enum Source<'a> {
    Changing(usize),
    Fixed(&'a Tensor),
    Cache(usize),
}

/// An input of the engine, and its shape.
pub(super) struct Input<'a> {
    pub(super) port: &'a Port,
    pub(super) source: Source<'a>,
    pub(super) shape: Vec<usize>,
}

impl<'a> Input<'a> {
    /// All of an engine's inputs.
    pub(super) fn all(
        ports: &'a [Port],
        signature: &GraphSignature,
        call: &'a StepCall<'_>,
    ) -> Result<Vec<Self>, RunError> {
        let given = call.changing.iter().chain(call.fixed.iter().map(|(name, _)| name));
        let mut given = given.copied().chain(call.caches.iter().map(|cache| cache.input));
        // An input that nothing in the graph uses may not be one of the engine.
        if let Some(name) = given.find(|name| !signature.inputs.iter().any(|input| input.name == *name)) {
            return Err(RunError::NoInput(name.to_owned()));
        }
        ports.iter().filter(|port| port.is_input).map(|port| Self::of(port, signature, call)).collect()
    }

    fn of(port: &'a Port, signature: &GraphSignature, call: &'a StepCall<'_>) -> Result<Self, RunError> {
        let is = |name: &str| name == port.name;
        let (source, shape, dtype) = if let Some(index) = call.changing.iter().position(|name| is(name)) {
            let info = signature.inputs.iter().find(|input| is(&input.name));
            (Source::Changing(index), vec![1; info.map_or(1, |info| info.shape.len())], DType::I64)
        } else if let Some(index) = call.caches.iter().position(|cache| is(cache.input)) {
            let rows = call.caches[index].rows;
            let [batch, groups, _, width] = *rows.shape() else { return Err(missing(port)) };
            (Source::Cache(index), vec![batch, groups, call.capacity, width], rows.dtype())
        } else {
            let (_, tensor) = call.fixed.iter().find(|(name, _)| is(name)).ok_or_else(|| missing(port))?;
            (Source::Fixed(tensor), tensor.shape().to_vec(), tensor.dtype())
        };
        if dtype != port.dtype {
            return Err(format!("input '{}' is {dtype}, expected {}", port.name, port.dtype).into());
        }
        Ok(Self { port, source, shape })
    }

    /// What decides whether a profile serves it.
    pub(super) fn asked(&self) -> Result<Given<'_>, RunError> {
        match self.source {
            Source::Fixed(tensor) => asked(self.port, tensor),
            _ => Ok(Given { name: &self.port.name, shape: &self.shape, value: None }),
        }
    }
}
