//! How fast this machine can go: the rates that bound a method's time from below.
//!
//! The rates are measured, not looked up: matrix products over the model's own weights and attention over as many rows
//! as a chunk has, as graphs in the same runtime with the same kernels, and reading memory with the same number of
//! threads. A fraction of such a floor says what the rest of a graph and the host code cost; it does not say whether a
//! better kernel exists.

use super::ProfileError;
use super::stats::{Protocol, measure, monotonic};
use crate::bundle::Bundle;
use crate::runtime::{Engine, Loader};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::{Target, Transformer};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions;
use accordion_graphs::onnx::{Dim, Model, Scope, Value};
use accordion_graphs::plan::OperationCount;
use accordion_graphs::precision::{self, MatrixForm, MatrixPart};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Bytes that are read to measure the memory: several times the last-level cache of most processors.
const READ_BYTES: usize = 512 << 20;

/// Each rate is taken from the fastest of at least three runs in at least half a second.
const PROTOCOL: Protocol = Protocol {
    warm_up_time: Duration::ZERO,
    warm_up_runs: 1,
    min_time: Duration::from_millis(500),
    min_runs: 3,
    max_time: None,
};

/// The best rates of this machine, by what a method spends its time on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Floating-point operations per second of the matrix products of one layer.
    pub linear_flops: f64,
    /// Floating-point operations per second of causal attention, counting the half that the mask leaves.
    pub attention_flops: f64,
    /// Bytes per second read from memory.
    pub read_bytes: f64,
}

impl Ceilings {
    /// Measures with the graphs' runtime: `loader`'s, over the weights of `bundle`, for chunks of `rows` tokens. Takes a
    /// few seconds, and half a gigabyte of memory for a moment.
    ///
    /// # Errors
    ///
    /// The model is not supported, or the runtime refuses or fails a graph.
    pub fn measure(loader: &dyn Loader, bundle: &Bundle, rows: usize, threads: usize) -> Result<Self, ProfileError> {
        let arch = bundle.architecture();
        let rows = rows.max(1);
        let attended = OperationCount::layer(arch, rows, rows).attention;
        let (mut linear, multiplied) = Probe::linear(loader, bundle, arch, rows)?;
        let mut attention = Probe::attention(loader, bundle, arch, rows)?;
        Ok(Self {
            linear_flops: multiplied as f64 / linear.fastest()?,
            attention_flops: attended as f64 / attention.fastest()?,
            read_bytes: read_rate(threads),
        })
    }

    /// Seconds that `operations` take at these rates.
    pub fn floor_seconds(&self, operations: &OperationCount) -> f64 {
        operations.linear as f64 / self.linear_flops + operations.attention as f64 / self.attention_flops
    }

    /// Seconds in which `bytes` can be read: the floor of a decoder's step, which reads all weights and the cache.
    pub fn read_seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.read_bytes
    }
}

/// Form and shape of matrices that are quantized.
type Forms = BTreeMap<String, (MatrixForm, [usize; 2])>;

/// The tensors of the model that `bundle` is of, under their own names. Those that are quantized lie where their entries do, which
/// serves for nothing but building a graph that is then rewritten.
fn matrices(bundle: &Bundle) -> (WeightIndex, Forms) {
    let stored = bundle.weights().index();
    let quantized = bundle.manifest().quantization.iter().flat_map(|quantization| &quantization.matrices);
    let mut forms = Forms::new();
    let mut tensors: BTreeMap<String, WeightRef> =
        stored.iter().map(|(name, weight)| (name.to_owned(), weight.clone())).collect();
    for (name, form) in quantized {
        if let Some(entries) = stored.get(&form.part_name(name, MatrixPart::Entries))
            && let &[out, inner] = &entries.shape[..]
        {
            forms.insert(name.clone(), (*form, [out, inner]));
            tensors.insert(name.clone(), WeightRef { dtype: DType::F32, ..entries.clone() });
        }
    }
    (WeightIndex::new(stored.files().to_vec(), tensors), forms)
}

/// Makes of `graph` what exporting `bundle`, whose matrices have these forms, made of its graphs.
fn in_precision(graph: &Scope, bundle: &Bundle, forms: &Forms) {
    if !forms.is_empty() {
        precision::quantize(graph, bundle.manifest().target, forms, &Rc::new(bundle.weights().index().clone()));
    }
}

/// A small graph, loaded, with its inputs.
struct Probe {
    engine: Box<dyn Engine>,
    inputs: Vec<(String, Tensor)>,
    outputs: Vec<String>,
}

impl Probe {
    /// The linear layers of the decoder's first layer, whatever they are called, in the bundle's precision, and the operations
    /// of all of them over `rows` rows.
    fn linear(
        loader: &dyn Loader,
        bundle: &Bundle,
        arch: &Architecture,
        rows: usize,
    ) -> Result<(Self, u64), ProfileError> {
        let (index, forms) = matrices(bundle);
        let g = Scope::new("linear_rate", Rc::new(index.clone()));
        let layer = format!("{}.layers.0.", Transformer::body_of(arch));
        let mut inputs: BTreeMap<usize, Value> = BTreeMap::new();
        let (mut outputs, mut elements) = (Vec::new(), 0);
        for (name, weight) in index.iter().filter(|(name, _)| name.starts_with(&layer)) {
            let (&[to, from], Some(path)) = (weight.shape.as_slice(), name.strip_suffix(".weight")) else { continue };
            let x = inputs
                .entry(from)
                .or_insert_with(|| g.input(&width_name(from), DType::F32, &["rows".into(), from.into()]));
            let product = x.linear(&g.scope(path).weight("weight", &[to, from]), None);
            let output = format!("y{}", outputs.len());
            g.output(&output, &product);
            outputs.push(output);
            elements += (to * from) as u64;
        }
        in_precision(&g, bundle, &forms);
        let inputs = inputs.into_keys().map(|width| Ok((width_name(width), varied([rows, width])?)));
        let inputs = inputs.collect::<Result<_, ProfileError>>()?;
        Ok((Self::load(loader, bundle, &g, inputs, outputs)?, 2 * elements * rows as u64))
    }

    /// Causal attention of one sequence, as the bundle's graphs have it.
    fn attention(loader: &dyn Loader, bundle: &Bundle, arch: &Architecture, rows: usize) -> Result<Self, ProfileError> {
        let g = Scope::new("attention_rate", Rc::default());
        let heads = [arch.num_heads(), arch.num_kv_heads(), arch.num_kv_heads()];
        let shape = |heads: usize| match bundle.manifest().target {
            Target::Portable => vec![1, heads, rows, arch.head_dim()],
            Target::OrtCpu => vec![1, rows, heads * arch.head_dim()],
        };
        let shapes = heads.map(shape);
        let names = ["query", "key", "value"];
        let dims = |shape: &[usize]| shape.iter().map(|&n| n.into()).collect::<Vec<Dim>>();
        let [q, k, v] = [0, 1, 2].map(|i: usize| g.input(names[i], DType::F32, &dims(&shapes[i])));
        let mixed = match bundle.manifest().target {
            Target::Portable => q.causal_attention(&k, &v),
            Target::OrtCpu => {
                let attributes = vec![("num_heads", heads[0].into()), ("kv_num_heads", heads[1].into())];
                let cache = (DType::F32, dims(&[1, heads[1], rows, arch.head_dim()]));
                let results = vec![(DType::F32, q.shape().to_vec()), cache.clone(), cache];
                g.call(&functions::CAUSAL_ATTENTION, &[&q, &k, &v], attributes, results)[0].clone()
            }
        };
        g.output("mixed", &mixed);
        in_precision(&g, bundle, &matrices(bundle).1);
        let inputs = names.iter().zip(&shapes).map(|(&name, shape)| Ok((name.to_owned(), varied(shape.clone())?)));
        let inputs = inputs.collect::<Result<_, ProfileError>>()?;
        Self::load(loader, bundle, &g, inputs, vec!["mixed".to_owned()])
    }

    fn load(
        loader: &dyn Loader,
        bundle: &Bundle,
        graph: &Scope,
        inputs: Vec<(String, Tensor)>,
        outputs: Vec<String>,
    ) -> Result<Self, ProfileError> {
        let locations: Vec<String> = bundle.manifest().weights.iter().map(|weight| weight.file.clone()).collect();
        let Model { bytes, signature } = graph.finish(&locations)?;
        let engine = loader.load("rate", &bytes, &signature.weights)?;
        Ok(Self { engine, inputs, outputs })
    }

    /// Seconds of the fastest run.
    fn fastest(&mut self) -> Result<f64, ProfileError> {
        let Self { engine, inputs, outputs } = self;
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let samples = measure(&PROTOCOL, monotonic(), || {
            engine.run(&inputs, &mut [], &outputs).map(drop).map_err(ProfileError::from)
        })?;
        Ok(seconds(&samples))
    }
}

/// What the probe calls its input of `width` columns.
fn width_name(width: usize) -> String {
    format!("x{width}")
}

/// The shortest of `samples`; never zero, so that it can divide.
fn seconds(samples: &[Duration]) -> f64 {
    samples.iter().min().map_or(f64::MAX, Duration::as_secs_f64).max(1e-9)
}

/// Values in -0.5 .. 0.5 that are not all alike: kernels may be quicker with zeros.
fn varied(shape: impl Into<Vec<usize>>) -> Result<Tensor, ProfileError> {
    let shape = shape.into();
    let count = shape.iter().product();
    let values = (0..count).map(|i: usize| (i.wrapping_mul(0x9E37_79B1) >> 8 & 0xFFFF) as f32 / 65_536.0 - 0.5);
    Ok(Tensor::from_f32(shape, values.collect())?)
}

/// Bytes per second that `threads` threads read from memory together.
fn read_rate(threads: usize) -> f64 {
    let buffer: Vec<u64> = (0..(READ_BYTES / size_of::<u64>()) as u64).collect();
    let share = buffer.len().div_ceil(threads.max(1));
    let sum = |part: &[u64]| part.iter().fold(0_u64, |sum, &value| sum.wrapping_add(value));
    let run = || {
        std::thread::scope(|scope| {
            for part in buffer.chunks(share) {
                scope.spawn(move || std::hint::black_box(sum(part)));
            }
        });
        Ok::<(), std::convert::Infallible>(())
    };
    let Ok(samples) = measure(&PROTOCOL, monotonic(), run);
    READ_BYTES as f64 / seconds(&samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_add_up_what_each_rate_takes() {
        let ceilings = Ceilings { linear_flops: 100.0, attention_flops: 10.0, read_bytes: 50.0 };
        let floor = ceilings.floor_seconds(&OperationCount { linear: 300, attention: 20 });
        assert!((floor - 5.0).abs() < 1e-12, "{floor}");
        assert!((ceilings.read_seconds(200) - 4.0).abs() < 1e-12);
    }
}
