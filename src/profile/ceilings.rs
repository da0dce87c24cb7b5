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
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::functions;
use accordion_graphs::onnx::{Dim, Model, Scope};
use accordion_graphs::plan::OperationCount;
use serde::{Deserialize, Serialize};
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
        let operations = OperationCount::layer(arch, rows, rows);
        let mut linear = Probe::linear(loader, bundle, arch, rows)?;
        let mut attention = Probe::attention(loader, bundle, arch, rows)?;
        Ok(Self {
            linear_flops: operations.linear as f64 / linear.fastest()?,
            attention_flops: operations.attention as f64 / attention.fastest()?,
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

/// A small graph, loaded, with its inputs.
struct Probe {
    engine: Box<dyn Engine>,
    inputs: Vec<(&'static str, Tensor)>,
    outputs: Vec<&'static str>,
}

impl Probe {
    /// The seven linear layers of the model's first layer, fed from each other as their widths allow.
    fn linear(loader: &dyn Loader, bundle: &Bundle, arch: &Architecture, rows: usize) -> Result<Self, ProfileError> {
        let g = Scope::new("linear_rate", Rc::new(bundle.weights().index().clone()));
        let x = g.input("x", DType::F32, &["rows".into(), arch.hidden_size().into()]);
        let layer = g.scope("model.layers.0");
        let (attn, mlp) = (layer.scope("self_attn"), layer.scope("mlp"));
        let [hidden, inner] = [arch.hidden_size(), arch.intermediate_size()];
        let [queries, keys] = [arch.num_heads(), arch.num_kv_heads()].map(|heads| heads * arch.head_dim());
        let weight =
            |block: &Scope, name: &str, from: usize, to: usize| block.scope(name).weight("weight", &[to, from]);
        let query = x.linear(&weight(&attn, "q_proj", hidden, queries), None);
        let gate = x.linear(&weight(&mlp, "gate_proj", hidden, inner), None);
        let products = [
            ("key", x.linear(&weight(&attn, "k_proj", hidden, keys), None)),
            ("value", x.linear(&weight(&attn, "v_proj", hidden, keys), None)),
            ("attended", query.linear(&weight(&attn, "o_proj", queries, hidden), None)),
            ("up", x.linear(&weight(&mlp, "up_proj", hidden, inner), None)),
            ("down", gate.linear(&weight(&mlp, "down_proj", inner, hidden), None)),
        ];
        for (name, value) in &products {
            g.output(name, value);
        }
        let inputs = vec![("x", varied([rows, hidden])?)];
        Self::load(loader, bundle, &g, inputs, products.map(|(name, _)| name).to_vec())
    }

    /// Causal attention of one sequence, as the graphs of the bundle's target have it.
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
        let inputs = names.iter().zip(&shapes).map(|(&name, shape)| Ok((name, varied(shape.clone())?)));
        let inputs = inputs.collect::<Result<_, ProfileError>>()?;
        Self::load(loader, bundle, &g, inputs, vec!["mixed"])
    }

    fn load(
        loader: &dyn Loader,
        bundle: &Bundle,
        graph: &Scope,
        inputs: Vec<(&'static str, Tensor)>,
        outputs: Vec<&'static str>,
    ) -> Result<Self, ProfileError> {
        let locations: Vec<String> = bundle.manifest().weights.iter().map(|weight| weight.file.clone()).collect();
        let Model { bytes, signature } = graph.finish(&locations)?;
        let engine = loader.load("rate", &bytes, &signature.weights)?;
        Ok(Self { engine, inputs, outputs })
    }

    /// Seconds of the fastest run.
    fn fastest(&mut self) -> Result<f64, ProfileError> {
        let Self { engine, inputs, outputs } = self;
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let samples = measure(&PROTOCOL, monotonic(), || {
            engine.run(&inputs, &mut [], outputs).map(drop).map_err(ProfileError::from)
        })?;
        Ok(seconds(&samples))
    }
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
