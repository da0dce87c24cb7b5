//! Grouped-query causal attention, with or without a cache.

use super::Target;
use super::linear::linear;
use super::rope::{self, Angles};
use crate::architecture::Llama;
use crate::dtype::DType;
use crate::functions;
use crate::onnx::{Dim, Scope, Value};

/// What all layers of a graph share about its rows: how many there are, and their rotary angles.
///
/// Activations are two-dimensional, `[batch * sequence, width]`, so that linear layers are plain matrix products; only
/// attention sees the batch.
pub struct Rows<'a> {
    arch: &'a Llama,
    target: Target,
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
    /// The residual stream after attention, `[batch * sequence, D]`.
    pub hidden: Value,
    /// Rotated queries `[batch, sequence, H * d]`.
    pub query: Value,
    /// Rotated keys `[batch, G, rows, d]`.
    pub key: Value,
    /// Values `[batch, G, rows, d]`.
    pub value: Value,
}

impl<'a> Rows<'a> {
    /// Rows at `positions [batch, sequence]`.
    pub fn new(g: &Scope, arch: &'a Llama, target: Target, positions: &Value, cache: Option<CachedRows>) -> Self {
        let g = g.scope("rows");
        let extent = positions.within(&g).shape_at_run_time(0, 2);
        let with_width = |width: usize| g.concat(&[&extent, &g.ints(&[width as i64])], 0);
        let [query_shape, key_shape] =
            [arch.num_heads, arch.num_kv_heads].map(|heads| with_width(heads * arch.head_dim));
        Self {
            arch,
            target,
            batch: positions.dim(0),
            sequence: positions.dim(1),
            angles: rope::angles(&g, arch, positions),
            query_shape,
            key_shape,
            cache,
        }
    }

    /// `x + o_proj(attention(norm(x)))` of layer `layer`, over `x [batch * sequence, D]` and, where the rows have a
    /// cache, the keys and values in `past`.
    pub fn attend(&self, layer: &Scope, x: &Value, past: Option<[&Value; 2]>) -> Attended {
        let arch = self.arch;
        let attn = layer.scope("self_attn");
        let normed = x.within(&layer.scope("input_layernorm"));
        let normed = normed.rms_norm(&layer.weight("input_layernorm.weight", &[arch.hidden_size]), arch.rms_norm_eps);

        let project = |name: &str, heads: usize, shape: &Value| {
            let width = heads * arch.head_dim;
            let g = attn.scope(name);
            let bias = arch.qkv_bias.then(|| g.weight("bias", &[width]));
            let weight = g.weight("weight", &[width, arch.hidden_size]);
            let flat = linear(&g, self.target, &normed, &weight, bias.as_ref());
            flat.reshape_as(shape, &[self.batch.clone(), self.sequence.clone(), width.into()])
        };
        let rotate = |x: Value, heads| x.within(&attn).rotary(&self.angles.cos, &self.angles.sin, heads);
        let query = rotate(project("q_proj", arch.num_heads, &self.query_shape), arch.num_heads);
        let key = rotate(project("k_proj", arch.num_kv_heads, &self.key_shape), arch.num_kv_heads);
        let value = project("v_proj", arch.num_kv_heads, &self.key_shape).within(&attn);

        let (mixed, key_cache, value_cache) = match self.target {
            Target::Portable => self.standard(&query, &key, &value, past),
            Target::OrtCpu => self.contributed(&attn, &query, &key, &value, past),
        };
        let o = attn.scope("o_proj");
        let width = arch.num_heads * arch.head_dim;
        let bias = arch.o_bias.then(|| o.weight("bias", &[arch.hidden_size]));
        let weight = o.weight("weight", &[arch.hidden_size, width]);
        let projected = linear(&o, self.target, &mixed.flatten_rows(), &weight, bias.as_ref());
        let hidden = x.within(layer) + projected;
        layer.tap("attn.q", &query);
        layer.tap("attn.k", &key);
        layer.tap("attn.v", &value);
        layer.tap("attn.out", &mixed);
        layer.tap("attn_residual", &hidden);
        Attended { hidden, query, key: key_cache, value: value_cache }
    }

    /// Standard operators, heads first.
    fn standard(&self, q: &Value, k: &Value, v: &Value, past: Option<[&Value; 2]>) -> (Value, Value, Value) {
        let heads_first = |x: &Value, heads: usize| {
            let shape = [self.batch.clone(), self.sequence.clone(), heads.into(), self.arch.head_dim.into()];
            x.reshape(&shape).transpose(&[0, 2, 1, 3])
        };
        let [h, g] = [self.arch.num_heads, self.arch.num_kv_heads];
        let (q4, k4, v4) = (heads_first(q, h), heads_first(k, g), heads_first(v, g));
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
        let [h, g] = [self.arch.num_heads, self.arch.num_kv_heads];
        let heads = vec![("num_heads", h.into()), ("kv_num_heads", g.into())];
        let out = (DType::F32, q.shape().to_vec());
        let cache = |rows: Dim| (DType::F32, vec![self.batch.clone(), g.into(), rows, self.arch.head_dim.into()]);
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
