//! The decoder over some rows, behind a cache or at the beginning.

use super::BisectError;
use super::case::{Case, Visit};
use super::rebuild::Rebuilt;
use crate::pipeline::decode::DECODER;
use crate::reference::cache::{Cache, KeyValue};
use crate::reference::decode::Continuation;
use crate::reference::to_tensor;
use crate::reference::transformer::Transformer;
use crate::tensor::Tensor;
use accordion_graphs::blocks::Target;
use ndarray::{Array3, s};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Rows that the decoder reads at once in a search: a fault shows in few.
pub(super) const ROWS: usize = 64;

/// One call of the decoder.
pub(super) struct DecoderCall<'a> {
    /// What distinguishes it from others.
    pub(super) place: &'a str,
    /// Token ids.
    pub(super) ids: &'a [u32],
    /// Position of the first of them.
    pub(super) first: i64,
    /// The reference's cache before the call, and after it.
    pub(super) cache: [&'a Cache; 2],
    /// Further inputs: what the bottom layers attend to.
    pub(super) injected: Vec<(String, Tensor)>,
    /// The reference's taps and logits.
    pub(super) expected: BTreeMap<String, Tensor>,
}

impl DecoderCall<'_> {
    pub(super) fn visit(self, rebuilt: &Rebuilt<'_>, visit: &mut Visit<'_>) -> Result<ControlFlow<()>, BisectError> {
        let Self { place, ids, first, cache: [before, after], mut injected, mut expected } = self;
        let graph = rebuilt.graph(DECODER)?;
        let rows = ids.len();
        let past = Past::new(graph.bundle.manifest().target, &before.layers, rows)?;
        let mut inputs = vec![
            ("input_ids".to_owned(), Tensor::from_i64([1, rows], ids.iter().map(|&id| i64::from(id)).collect())?),
            ("position_ids".to_owned(), Tensor::from_i64([1, rows], (first..).take(rows).collect())?),
            ("num_logits_to_keep".to_owned(), Tensor::from_i64([1], vec![rows as i64])?),
        ];
        inputs.append(&mut injected);
        inputs.extend(past.inputs);
        expected.extend(present(&after.layers)?);
        visit(&Case { graph: &graph, place: place.to_owned(), inputs, in_place: past.in_place, expected })
    }
}

/// The cache of some layers as a graph takes it.
pub(super) struct Past {
    pub(super) inputs: Vec<(String, Tensor)>,
    pub(super) in_place: Vec<[String; 2]>,
}

impl Past {
    /// What `layers` hold, with room for `new` rows where a graph of `target` appends in place.
    pub(super) fn new(target: Target, layers: &[KeyValue], new: usize) -> Result<Self, BisectError> {
        let (mut inputs, mut in_place) = (Vec::new(), Vec::new());
        if target == Target::OrtCpu {
            let length = layers.first().map_or(0, KeyValue::rows);
            inputs.push(("past_length".to_owned(), Tensor::from_i64([1], vec![length as i64])?));
        }
        for (layer, kv) in layers.iter().enumerate() {
            for (part, rows) in [("key", &kv.k), ("value", &kv.v)] {
                let [past, present] = ["past_key_values", "present"].map(|what| format!("{what}.{layer}.{part}"));
                let rows = match target {
                    Target::Portable => batched(rows)?,
                    Target::OrtCpu => {
                        let (groups, length, width) = rows.dim();
                        let mut roomy = Array3::zeros((groups, length + new, width));
                        roomy.slice_mut(s![.., ..length, ..]).assign(rows);
                        in_place.push([past.clone(), present]);
                        batched(&roomy)?
                    }
                };
                inputs.push((past, rows));
            }
        }
        Ok(Self { inputs, in_place })
    }
}

/// The rows of `layers` under the names of the outputs that hold them.
pub(super) fn present(layers: &[KeyValue]) -> Result<Vec<(String, Tensor)>, BisectError> {
    let named = layers.iter().enumerate().flat_map(|(layer, kv)| {
        [("key", &kv.k), ("value", &kv.v)].map(|(part, rows)| (format!("present.{layer}.{part}"), rows))
    });
    named.map(|(name, rows)| Ok((name, to_tensor(rows)?))).collect()
}

/// `rows` with a batch axis.
pub(super) fn batched(rows: &Array3<f32>) -> Result<Tensor, BisectError> {
    let tensor = to_tensor(rows)?;
    Ok(tensor.reshaped([&[1], tensor.shape()].concat())?)
}

/// Visits the decoder on `ids` behind what `context` holds.
pub(super) fn continue_from(
    rebuilt: &Rebuilt<'_>,
    reference: &dyn Transformer,
    context: &Continuation,
    (place, ids): (&str, &[u32]),
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let first = context.next_position;
    let mut after = context.clone();
    let mut expected = BTreeMap::from([("embed".to_owned(), to_tensor(&reference.embed(ids)?)?)]);
    let logits = after.feed(reference, ids, &mut expected)?;
    expected.insert("logits".to_owned(), to_tensor(&logits)?);
    let cache = [&context.cache, &after.cache];
    DecoderCall { place, ids, first, cache, injected: Vec::new(), expected }.visit(rebuilt, visit)
}
