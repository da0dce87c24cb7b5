//! The plain decoder: one reading of a prompt from an empty cache.

use super::BisectError;
use super::case::Case;
use super::rebuild::Rebuilt;
use super::search::{Found, bisect};
use crate::pipeline::PipelineError;
use crate::pipeline::decode::DECODER;
use crate::reference::transformer::Transformer;
use crate::reference::{plain, to_tensor};
use crate::runtime::Loader;
use crate::tensor::Tensor;
use accordion_graphs::blocks::Target;
use std::collections::BTreeMap;

/// Looks for the first wrong point of the decoder on `ids`, from position 0 on.
///
/// # Errors
///
/// A side cannot be run.
pub fn bisect_plain(
    rebuilt: &Rebuilt<'_>,
    loader: &dyn Loader,
    reference: &dyn Transformer,
    ids: &[u32],
) -> Result<Option<Found>, BisectError> {
    let graph = rebuilt.graph(DECODER)?;
    let manifest = graph.bundle.manifest();
    let arch = &manifest.architecture;
    let vocab_size = arch.vocab_size();
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(PipelineError::TokenId { id, vocab_size }.into());
    }
    let rows = ids.len();
    let positions: Vec<i64> = (0..rows as i64).collect();
    let mut expected = BTreeMap::new();
    expected.insert("embed".to_owned(), to_tensor(&reference.embed(ids)?)?);
    let mut cache = reference.empty_cache();
    let hidden = plain::forward(reference, ids, &positions, &mut cache, &mut expected)?;
    expected.insert("logits".to_owned(), to_tensor(&reference.logits(&hidden))?);

    let one = |n: usize| Tensor::from_i64([1], vec![n as i64]);
    let mut inputs = vec![
        ("input_ids".to_owned(), Tensor::from_i64([1, rows], ids.iter().map(|&id| i64::from(id)).collect())?),
        ("position_ids".to_owned(), Tensor::from_i64([1, rows], positions)?),
        ("num_logits_to_keep".to_owned(), one(rows)?),
    ];
    let mut in_place = Vec::new();
    // What is appended to in place needs room.
    let room = match manifest.target {
        Target::Portable => 0,
        Target::OrtCpu => {
            inputs.push(("past_length".to_owned(), one(0)?));
            rows
        }
    };
    for (layer, kv) in cache.layers.iter().enumerate() {
        for (part, rows_of) in [("key", &kv.k), ("value", &kv.v)] {
            let [past, present] = ["past_key_values", "present"].map(|what| format!("{what}.{layer}.{part}"));
            expected.insert(present.clone(), to_tensor(rows_of)?);
            let shape = [1, arch.num_kv_heads(), room, arch.head_dim()];
            let empty = Tensor::from_f32(shape, vec![0.0; shape.iter().product()])?;
            inputs.push((past.clone(), empty));
            if manifest.target == Target::OrtCpu {
                in_place.push([past, present]);
            }
        }
    }
    bisect(&Case { graph: &graph, place: String::new(), inputs, in_place, expected }, loader)
}
