//! Taps: intermediate tensors under names that the reference, the graphs and the golden files share.
//!
//! Names of HOMER taps are those of the golden files. Per node, `node.h<height>.i<index>.` followed by `in_hidden`,
//! `in_position_ids`, `in_k.<layer>`, `in_v.<layer>`, `prune.metric_last`, `prune.scores`, `prune.attn_out_hidden`,
//! `prune.keep_idx`, `out_hidden`, `out_position_ids`; for the result `prefix.last_hidden`, `prefix.logits`,
//! `prefix.position_ids`, `cache.k.<layer>`, `cache.v.<layer>`. Inside a layer, `layers.<l>.` followed by
//! `attn.q` and `attn.k` (after rotation), `attn.v`, `attn.out` (before the output projection), `attn_residual`,
//! `mlp.out` and `out`. No tap carries a batch axis.
//!
//! RCC, per segment: `encoder.layers.<l>.` followed by a layer's taps (of a Mamba block `conv`, `dt`, `scan` and `out`),
//! `encoder.states.<m>` (the rows of state `m` that become slots), `maps.<i>` (what is added behind layer `i - 1` of the
//! decoder; the first is the embedding), and the decoder's layers over the slots as `layers.<l>.`, with `injected` for the
//! stream after the addition. `accordion verify` puts `segments.<s>.` before them.
//!
//! SharedLLM: `query.vector`, which halves are compared with; per level of the context tree, `tree.<w>.` followed by
//! `candidates` (ids of all left and then all right halves), `vectors`, `similarity`, `chosen` (0 or 1 per node), `encoded_ids`
//! and, for each lower layer, `layers.<l>.key` and `.value` of whole nodes; `kv.<l>.key` and `.value` of the tokens that are
//! kept. What is inside a node, `tree.<w>.nodes.<i>.layers.<l>.`, inside a half that is compared, `tree.<w>.halves.<i>.layers.0.`,
//! and behind the query, `query.layers.0.`, graphs have for all of them at once; a search for a fault puts them together.
//! In the upper model's injected layers, `cross.out` (before the output projection) and `cross_residual`.
//!
//! What reads on behind a context has the taps of a layer too, which `accordion verify` calls `prompt.`, `running.`,
//! `teacher.` and `steps.<i>.`
//!
//! Shapes, row-major, with `rows` tokens, `H` heads, `G` key heads of width `d`, hidden width `D`, vocabulary `V`: what is
//! stored or selected by head is heads first, `cache.*`, `in_k` and `in_v` `[G, rows, d]` and `prune.metric_last`
//! `[H, rows]`; inside a layer everything is by row, `attn.q` and `attn.out` `[rows, H * d]`, `attn.k` and `attn.v`
//! `[rows, G * d]`, the rest `[rows, D]`. Logits are `[rows, V]`, scores, indices and position ids `[rows]`.
//! States and maps are `[slots, width]`. Of a tree with `n` nodes, or kept of `n` chunks, keys and values are `[n, G, rows, d]`,
//! ids `[n, rows]`, vectors `[2 * n, D]`, similarities `[2 * n]` and choices `[n]`.

use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Where taps go. A sink that wants nothing costs nothing: producers ask before they materialise a tensor.
pub trait TapSink {
    /// Whether the tap called `name` should be recorded.
    fn wants(&self, name: &str) -> bool;

    /// Takes the tap called `name`.
    fn record(&mut self, name: &str, value: Tensor);
}

/// Records nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTaps;

impl TapSink for NoTaps {
    fn wants(&self, _name: &str) -> bool {
        false
    }

    fn record(&mut self, _name: &str, _value: Tensor) {}
}

/// Records every tap, by name.
impl TapSink for BTreeMap<String, Tensor> {
    fn wants(&self, _name: &str) -> bool {
        true
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.insert(name.to_owned(), value);
    }
}
