//! Attention of a decoder's rows to a compressed context, between a layer's attention and its MLP.

use super::attention::{heads_first, rows_first};
use super::{Residual, Transformer, unflatten};
use crate::onnx::{Dim, Scope, Value};

impl Transformer<'_> {
    /// What attention of layer `layer` left, plus what its rows find in `[key, value]`, each `[batch, G, injected, d]`.
    /// `positions [batch, sequence]` says how the rows divide.
    ///
    /// Every row sees all of the context. The keys come rotated such that queries need no rotation.
    pub fn cross_attend(
        &self,
        layer: &Scope,
        residual: &Residual,
        positions: &Value,
        [key, value]: [&Value; 2],
    ) -> Residual {
        let g = layer.scope_tapped_as("cross_attn", "cross");
        let arch = self.arch;
        let [heads, width] = [arch.num_heads(), arch.num_heads() * arch.head_dim()];
        let normed = self.norm(&g, "layernorm", &residual.stream);
        let query = self.project(&g, "q_proj", &normed, [arch.hidden_size(), width], false).within(&g);
        let query = heads_first(&unflatten(&query, positions), heads);
        // Without a mask, the heads that share keys are only more rows of these.
        let [groups, per_group] = [arch.num_kv_heads(), heads / arch.num_kv_heads().max(1)].map(Dim::from);
        let shared = query.reshape(&[query.dim(0), groups, &per_group * &query.dim(2), query.dim(3)]);
        let mixed = shared.attention_over(key, value, None).reshape(query.shape());
        let mixed = rows_first(&mixed, width.into());
        let projected = self.project(&g, "o_proj", &mixed.flatten_rows(), [width, arch.hidden_size()], false);
        let stream = residual.stream.within(layer) + &projected;
        g.tap("out", &mixed);
        layer.tap("cross_residual", &stream);
        residual.with_stream(stream)
    }
}
