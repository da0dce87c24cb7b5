//! Taps: intermediate tensors under names that the reference, the graphs and the golden files share.
//!
//! Names of HOMER taps are those of the golden files. Per node, `node.h<height>.i<index>.` followed by `in_hidden`,
//! `in_position_ids`, `in_k.<layer>`, `in_v.<layer>`, `prune.metric_last`, `prune.scores`, `prune.attn_out_hidden`,
//! `prune.keep_idx`, `out_hidden`, `out_position_ids`; for the result `prefix.last_hidden`, `prefix.logits`,
//! `prefix.position_ids`, `cache.k.<layer>`, `cache.v.<layer>`. Inside a layer, `layers.<l>.` followed by
//! `attn.q` and `attn.k` (after rotation), `attn.v`, `attn.out` (before the output projection), `attn_residual`,
//! `mlp.out` and `out`. No tap carries a batch axis.
//!
//! Shapes, row-major, with `rows` tokens, `H` heads, `G` key heads of width `d`, hidden width `D`, vocabulary `V`: what is
//! stored or selected by head is heads first, `cache.*`, `in_k` and `in_v` `[G, rows, d]` and `prune.metric_last`
//! `[H, rows]`; inside a layer everything is by row, `attn.q` and `attn.out` `[rows, H * d]`, `attn.k` and `attn.v`
//! `[rows, G * d]`, the rest `[rows, D]`. Logits are `[rows, V]`, scores, indices and position ids `[rows]`.

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
