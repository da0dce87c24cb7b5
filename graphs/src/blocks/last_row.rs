//! A layer over sequences of which only the last row is wanted: all rows are keys and values, one is a query.

use super::attention::{heads_first, rows_first};
use super::rope::{self, Angles};
use super::{Residual, Transformer};
use crate::onnx::{Scope, Value};

impl Transformer<'_> {
    /// Keys and values of layer `layer` for `x [rows, D]`, `[rows, G * d]` each, before any rotation.
    pub fn unrotated_keys_values(&self, layer: &Scope, x: &Value) -> [Value; 2] {
        self.keys_values(layer, &self.attention_input(layer, x))
    }

    /// The first half of layer `layer` for the last row of every sequence, `x [batch, D]`. The sequences' rows at
    /// `positions [batch, length]`, or `[1, length]` if all are alike, have the keys and values `[batch, length, G * d]`,
    /// which are not rotated yet.
    pub fn attend_last(&self, layer: &Scope, x: &Value, positions: &Value, [key, value]: [&Value; 2]) -> Residual {
        let (arch, attn) = (self.arch, self.attention_scope(layer));
        let normed = self.attention_input(layer, x);
        let query = self.queries(layer, &normed).within(&attn);
        let angles = self.angles_for(&attn, positions, key);
        let query = query.reshape(&[x.dim(0), 1.into(), query.dim(1)]);
        let query = query.rotary(&angles.cos.last(1), &angles.sin.last(1), arch.num_heads());
        let key = key.within(&attn).rotary(&angles.cos, &angles.sin, arch.num_kv_heads());
        let [key, value] = [&key, &value.within(&attn)].map(|x| heads_first(x, arch.num_kv_heads()));
        let mixed = heads_first(&query, arch.num_heads()).attention_over(&key, &value, None);
        let mixed = rows_first(&mixed, query.dim(2)).reshape(&[x.dim(0), query.dim(2)]);
        let residual = self.residual(layer, x, &self.attention_output(layer, &mixed));
        layer.tap("attn.out", &mixed);
        layer.tap("attn_residual", &residual.stream);
        residual
    }

    /// The angles at `positions` for each sequence of `like [batch, length, ..]`.
    fn angles_for(&self, g: &Scope, positions: &Value, like: &Value) -> Angles {
        let Angles { cos, sin } = rope::angles(g, self.arch.rope(), self.arch.rotary_dims(), positions);
        let shape = g.concat(&[&like.within(g).shape_at_run_time(0, 2), &cos.shape_at_run_time(2, 3)], 0);
        let every = |x: &Value| x.expand(&shape, &[like.dim(0), like.dim(1), x.dim(2)]);
        Angles { cos: every(&cos), sin: every(&sin) }
    }
}
