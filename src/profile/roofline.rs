//! How far something is from the limit of the machine: what it has to compute and to read at least, over the rates that
//! were measured.

use super::ceilings::Ceilings;
use crate::bundle::Bundle;
use crate::pipeline::ContextState;
use crate::pipeline::decode::{DECODER, DECODER_KV_INT8};
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::blocks::Transformer;
use accordion_graphs::plan::OperationCount;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What has to be done at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Floating-point operations in matrix products with weights.
    pub linear_operations: u64,
    /// Floating-point operations in attention.
    pub attention_operations: u64,
    /// Bytes to be read from memory.
    pub read_bytes: u64,
}

/// Which limit is the nearer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Arithmetic.
    Compute,
    /// Reading memory.
    Memory,
}

impl Bound {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        }
    }
}

/// A limit, and how much of it was reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// What bounds it.
    pub bound: Bound,
    /// The shortest time that the limit allows, in milliseconds.
    pub floor_ms: f64,
    /// That time over the measured one: 1 is the limit.
    pub fraction: f64,
}

impl Roofline {
    /// How far `measured_ms` is from what `ceilings` allow; `None` if nothing has to be done or no time was measured.
    pub fn new(demand: &Demand, ceilings: &Ceilings, measured_ms: f64) -> Option<Self> {
        let operations = OperationCount { linear: demand.linear_operations, attention: demand.attention_operations };
        let (compute, memory) = (ceilings.floor_seconds(&operations), ceilings.read_seconds(demand.read_bytes));
        let bound = if compute >= memory { Bound::Compute } else { Bound::Memory };
        let floor_ms = compute.max(memory) * 1e3;
        (floor_ms > 0.0 && measured_ms > 0.0).then(|| Self { bound, floor_ms, fraction: floor_ms / measured_ms })
    }
}

impl Demand {
    /// Of building a prefix that takes `operations` in `graphs`: all of their weights are read at least once.
    pub fn of_prefix<'a>(
        bundle: &Bundle,
        operations: &OperationCount,
        graphs: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        Self::new(operations, weight_bytes(bundle, graphs))
    }

    /// Of a decoding step of one token behind `state` and `decoded` more: the decoder's weights, the cache and the
    /// injected rows are read once.
    pub fn of_step(bundle: &Bundle, state: &ContextState, decoded: usize) -> Self {
        let arch = bundle.architecture();
        let past = state.len() + decoded;
        let mut operations =
            OperationCount::layer_after(arch, past, 1, 1).times(arch.num_layers()) + OperationCount::lm_head(arch, 1);
        let decoder = if state.scales.is_some() { DECODER_KV_INT8 } else { DECODER };
        let rows_held = state.cache.first().map_or(0, |[key, _]| key.shape().get(2).copied().unwrap_or(0)).max(1);
        let held: u64 = state.cache.iter().flatten().map(|tensor| tensor.byte_len() as u64).sum();
        let mut cache = held / rows_held as u64 * past as u64;
        let width = arch.num_heads() * arch.head_dim();
        for layer in state.injected.iter().flat_map(|injected| &injected.layers) {
            let key = layer.single_key.as_ref().unwrap_or(&layer.key);
            cache += (key.bytes().len() + layer.value.bytes().len()) as u64;
            let rows = key.shape().get(2).copied().unwrap_or(0);
            operations += OperationCount::linear_map(arch.hidden_size(), width, 2);
            operations += OperationCount { linear: 0, attention: 4 * (width * rows) as u64 };
        }
        Self::new(&operations, weight_bytes(bundle, [decoder]) + cache)
    }

    fn new(operations: &OperationCount, read_bytes: u64) -> Self {
        let OperationCount { linear, attention } = *operations;
        Self { linear_operations: linear, attention_operations: attention, read_bytes }
    }
}

/// Bytes of the weights that running all of `graphs` reads, each weight once. Of a table of embeddings only the rows of
/// the tokens are read, next to nothing: it counts where it is the output matrix as well.
fn weight_bytes<'a>(bundle: &Bundle, graphs: impl IntoIterator<Item = &'a str>) -> u64 {
    let arch = bundle.architecture();
    let mut vocabularies = vec![arch.vocab_size()];
    match &bundle.manifest().compressor {
        Some(Compressor::Rcc(model)) => vocabularies.push(model.encoder.vocab_size()),
        Some(Compressor::SharedLlm(model)) => vocabularies.push(model.lower.vocab_size),
        _ => {}
    }
    let index = bundle.weights().index();
    let mut counted = BTreeSet::new();
    let mut bytes = 0;
    for signature in graphs.into_iter().filter_map(|graph| bundle.signature(graph)) {
        let has_head = signature.outputs.iter().any(|output| output.name == "logits");
        for name in &signature.weights {
            let Some(weight) = index.get(name) else { continue };
            // A matrix of a layer may have as many rows by chance: its path has the layer's number in it.
            let in_layer = name.split('.').any(|word| word.parse::<u32>().is_ok());
            let per_token = !in_layer && matches!(&weight.shape[..], [rows, _] if vocabularies.contains(rows));
            let read = !per_token || has_head && is_output_matrix(name, arch);
            if read && counted.insert((weight.file, weight.offset)) {
                bytes += weight.len;
            }
        }
    }
    bytes
}

/// Whether the matrix `name`, which has a row per token of the vocabulary, makes logits.
fn is_output_matrix(name: &str, arch: &Architecture) -> bool {
    let in_body = name.strip_prefix(Transformer::body_of(arch)).is_some_and(|rest| rest.starts_with('.'));
    in_body == arch.tie_word_embeddings()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CEILINGS: Ceilings = Ceilings { linear_flops: 1000.0, attention_flops: 100.0, read_bytes: 50.0 };

    fn demand(linear_operations: u64, attention_operations: u64, read_bytes: u64) -> Demand {
        Demand { linear_operations, attention_operations, read_bytes }
    }

    #[test]
    fn the_nearer_limit_counts() {
        // 1 s + 1 s of arithmetic against 1 s of reading, then against 4 s.
        let found = Roofline::new(&demand(1000, 100, 50), &CEILINGS, 4000.0).unwrap();
        assert_eq!((found.bound, found.floor_ms, found.fraction), (Bound::Compute, 2000.0, 0.5));
        let found = Roofline::new(&demand(1000, 100, 200), &CEILINGS, 5000.0).unwrap();
        assert_eq!((found.bound, found.floor_ms, found.fraction), (Bound::Memory, 4000.0, 0.8));
    }

    #[test]
    fn nothing_to_do_has_no_limit() {
        assert_eq!(Roofline::new(&demand(0, 0, 0), &CEILINGS, 1.0), None);
        assert_eq!(Roofline::new(&demand(1, 0, 0), &CEILINGS, 0.0), None);
    }
}
