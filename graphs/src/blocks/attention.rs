//! Grouped-query causal attention, with or without a cache.

use super::rope::{self, Angles};
use super::{Residual, Target, Transformer};
use crate::dtype::DType;
use crate::functions;
use crate::onnx::{Dim, Scope, Value};

/// What all layers of a graph share about its rows: how many there are, and their rotary angles.
///
/// Activations are two-dimensional, `[batch * sequence, width]`, so that linear layers are plain matrix products; only
/// attention sees the batch.
pub struct Rows<'a> {
    model: &'a Transformer<'a>,
    batch: Dim,
    sequence: Dim,
    angles: Angles,
    query_shape: Value,
    key_shape: Value,
    cache: Option<CachedRows>,
}

/// What a cache adds to [`Rows`].
pub enum CachedRows {
    /// The cache has room: `past_length [1]` rows are valid, new ones go behind them.
    InPlace {
        /// Number of valid rows.
        past_length: Value,
    },
    /// The cache is exactly the past; the result is longer. `visible [sequence, past + sequence]` says which rows each
    /// row attends to.
    Growing {
        /// True where a row (first axis) sees another.
        visible: Value,
    },
}

/// What attention yields.
pub struct Attended {
    /// What the second half of the layer goes on with.
    pub residual: Residual,
    /// Rotated queries `[batch, sequence, H * d]`.
    pub query: Value,
    /// Rotated keys `[batch, G, rows, d]`.
    pub key: Value,
    /// Values `[batch, G, rows, d]`.
    pub value: Value,
}

impl<'a> Rows<'a> {
    /// Rows of `model` at `positions [batch, sequence]`.
    pub fn new(g: &Scope, model: &'a Transformer<'a>, positions: &Value, cache: Option<CachedRows>) -> Self {
        let g = g.scope("rows");
        let arch = model.arch;
        let extent = positions.within(&g).shape_at_run_time(0, 2);
        let with_width = |width: usize| g.concat(&[&extent, &g.ints(&[width as i64])], 0);
        let [query_shape, key_shape] =
            [arch.num_heads(), arch.num_kv_heads()].map(|heads| with_width(heads * arch.head_dim()));
        Self {
            model,
            batch: positions.dim(0),
            sequence: positions.dim(1),
            angles: rope::angles(&g, arch.rope(), arch.rotary_dims(), positions),
            query_shape,
            key_shape,
            cache,
        }
    }

    /// The first half of layer `layer`, over `x [batch * sequence, D]` and, where the rows have a cache, the keys and
    /// values in `past`.
    pub fn attend(&self, layer: &Scope, x: &Value, past: Option<[&Value; 2]>) -> Attended {
        let (query, key, value) = self.projections(layer, x);
        let attn = self.model.attention_scope(layer);
        let (mixed, key_cache, value_cache) = match self.model.target {
            Target::Portable => self.standard(&query, &key, &value, past),
            Target::OrtCpu => self.contributed(&attn, &query, &key, &value, past),
        };
        let projected = self.model.attention_output(layer, &mixed.flatten_rows());
        let residual = self.model.residual(layer, x, &projected);
        layer.tap("attn.q", &query);
        layer.tap("attn.k", &key);
        layer.tap("attn.v", &value);
        layer.tap("attn.out", &mixed);
        layer.tap("attn_residual", &residual.stream);
        Attended { residual, query, key: key_cache, value: value_cache }
    }

    /// Only the keys and values of layer `layer` for `x [batch * sequence, D]`, `[batch, G, sequence, d]`, keys rotated.
    pub fn keys_values(&self, layer: &Scope, x: &Value) -> [Value; 2] {
        let (_, key, value) = self.projections(layer, x);
        [key, value].map(|x| self.heads_first(&x, self.model.arch.num_kv_heads()))
    }

    /// Rotated queries `[batch, sequence, H * d]`, rotated keys and values `[batch, sequence, G * d]`.
    fn projections(&self, layer: &Scope, x: &Value) -> (Value, Value, Value) {
        let arch = self.model.arch;
        let attn = self.model.attention_scope(layer);
        let normed = self.model.attention_input(layer, x);
        let [query, key, value] = self.model.queries_keys_values(layer, &normed);
        let by_sequence = |flat: &Value, shape: &Value| {
            flat.within(&attn).reshape_as(shape, &[self.batch.clone(), self.sequence.clone(), flat.dim(1)])
        };
        let rotate = |x: &Value, heads| x.rotary(&self.angles.cos, &self.angles.sin, heads);
        let query = rotate(&by_sequence(&query, &self.query_shape), arch.num_heads());
        let key = rotate(&by_sequence(&key, &self.key_shape), arch.num_kv_heads());
        (query, key, by_sequence(&value, &self.key_shape))
    }

    /// `x [batch, sequence, heads * d]` as `[batch, heads, sequence, d]`.
    fn heads_first(&self, x: &Value, heads: usize) -> Value {
        let shape = [self.batch.clone(), self.sequence.clone(), heads.into(), self.model.arch.head_dim().into()];
        x.reshape(&shape).transpose(&[0, 2, 1, 3])
    }

    /// Standard operators, heads first.
    fn standard(&self, q: &Value, k: &Value, v: &Value, past: Option<[&Value; 2]>) -> (Value, Value, Value) {
        let [h, g] = [self.model.arch.num_heads(), self.model.arch.num_kv_heads()];
        let (q4, k4, v4) = (self.heads_first(q, h), self.heads_first(k, g), self.heads_first(v, g));
        let (out, key, value) = match (&self.cache, past) {
            (Some(CachedRows::Growing { visible }), Some(past)) => q4.attention(&k4, &v4, visible, past),
            _ => (q4.causal_attention(&k4, &v4), k4, v4),
        };
        (out.transpose(&[0, 2, 1, 3]).reshape_as(&self.query_shape, q.shape()), key, value)
    }

    /// Our functions, whose kernels take the projections as they are.
    fn contributed(
        &self,
        attn: &Scope,
        q: &Value,
        k: &Value,
        v: &Value,
        past: Option<[&Value; 2]>,
    ) -> (Value, Value, Value) {
        let [h, g] = [self.model.arch.num_heads(), self.model.arch.num_kv_heads()];
        let heads = vec![("num_heads", h.into()), ("kv_num_heads", g.into())];
        let out = (DType::F32, q.shape().to_vec());
        let cache =
            |rows: Dim| (DType::F32, vec![self.batch.clone(), g.into(), rows, self.model.arch.head_dim().into()]);
        let results =
            if let (Some(CachedRows::InPlace { past_length }), Some([past_key, past_value])) = (&self.cache, past) {
                let cache = cache(past_key.dim(2));
                let inputs = [q, k, v, past_key, past_value, past_length];
                attn.call(&functions::CACHED_ATTENTION, &inputs, heads, vec![out, cache.clone(), cache])
            } else {
                let cache = cache(self.sequence.clone());
                attn.call(&functions::CAUSAL_ATTENTION, &[q, k, v], heads, vec![out, cache.clone(), cache])
            };
        (results[0].clone(), results[1].clone(), results[2].clone())
    }
}
