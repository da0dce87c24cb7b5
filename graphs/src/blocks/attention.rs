//! Grouped-query causal attention, with or without a cache.

use super::rope::{self, Angles};
use super::{Residual, Target, Transformer};
use crate::architecture::Architecture;
use crate::dtype::DType;
use crate::functions;
use crate::onnx::{Attribute, Dim, Scope, Value};

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
    /// The cache is read and stays as it is: there is one new row in every sequence, and [`Attended`] has the keys and values
    /// of that alone. `visible [capacity]` says which rows of the cache it attends to.
    Fixed {
        /// True where a row is valid.
        visible: Value,
    },
}

/// Keys and values of one layer, `[batch, G, rows, d]`.
#[derive(Clone)]
pub struct LayerCache {
    /// Keys, rotated, and values: fp32, or int8 where there are scales.
    pub rows: [Value; 2],
    /// What the entries of either count in, `[batch, G, 1, d]`.
    pub scales: Option<[Value; 2]>,
}

/// What attention yields.
pub struct Attended {
    /// What the second half of the layer goes on with.
    pub residual: Residual,
    /// Rotated queries `[batch, sequence, H * d]`.
    pub query: Value,
    /// Rotated keys of past and new rows, `[batch, G, rows, d]`; of the new ones where the cache is [`CachedRows::Fixed`].
    pub key: Value,
    /// Values of the same rows, `[batch, G, rows, d]`.
    pub value: Value,
    /// What the entries of keys and values count in, where the past was of 8-bit integers.
    pub scales: Option<[Value; 2]>,
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
    pub fn attend(&self, layer: &Scope, x: &Value, past: Option<&LayerCache>) -> Attended {
        let (query, key, value) = self.projections(layer, x);
        let attn = self.model.attention_scope(layer);
        let (mixed, cache) = if let (Some(cache), Some(past)) = (&self.cache, past) {
            self.attention_with_past(&attn, [&query, &key, &value], cache, past)
        } else {
            let (mixed, key, value) = causal_attention(self.model, &attn, [&query, &key, &value]);
            (mixed, LayerCache { rows: [key, value], scales: None })
        };
        let projected = self.model.attention_output(layer, &mixed.flatten_rows());
        let residual = self.model.residual(layer, x, &projected);
        layer.tap("attn.q", &query);
        layer.tap("attn.k", &key);
        layer.tap("attn.v", &value);
        layer.tap("attn.out", &mixed);
        layer.tap("attn_residual", &residual.stream);
        let LayerCache { rows: [key, value], scales } = cache;
        Attended { residual, query, key, value, scales }
    }

    /// Only the keys and values of layer `layer` for `x [batch * sequence, D]`, `[batch, G, sequence, d]`, keys rotated.
    pub fn keys_values(&self, layer: &Scope, x: &Value) -> [Value; 2] {
        let normed = self.model.attention_input(layer, x);
        let [key, value] = self.model.keys_values(layer, &normed);
        [self.rotated_keys(layer, &key), self.by_sequence(layer, &value, &self.key_shape)]
            .map(|x| heads_first(&x, self.model.arch.num_kv_heads()))
    }

    /// Rotated queries `[batch, sequence, H * d]`, rotated keys and values `[batch, sequence, G * d]`.
    fn projections(&self, layer: &Scope, x: &Value) -> (Value, Value, Value) {
        let normed = self.model.attention_input(layer, x);
        let [query, key, value] = self.model.queries_keys_values(layer, &normed);
        let query = self.by_sequence(layer, &query, &self.query_shape).rotary(
            &self.angles.cos,
            &self.angles.sin,
            self.model.arch.num_heads(),
        );
        (query, self.rotated_keys(layer, &key), self.by_sequence(layer, &value, &self.key_shape))
    }

    fn rotated_keys(&self, layer: &Scope, key: &Value) -> Value {
        let key = self.by_sequence(layer, key, &self.key_shape);
        key.rotary(&self.angles.cos, &self.angles.sin, self.model.arch.num_kv_heads())
    }

    /// `flat [batch * sequence, width]` as `[batch, sequence, width]`, which `shape` holds at run time.
    fn by_sequence(&self, layer: &Scope, flat: &Value, shape: &Value) -> Value {
        let attn = self.model.attention_scope(layer);
        flat.within(&attn).reshape_as(shape, &[self.batch.clone(), self.sequence.clone(), flat.dim(1)])
    }

    /// Attention over the rows that `cache` says of `past` and the new ones.
    fn attention_with_past(
        &self,
        attn: &Scope,
        [query, key, value]: [&Value; 3],
        cache: &CachedRows,
        past: &LayerCache,
    ) -> (Value, LayerCache) {
        let arch = self.model.arch;
        match cache {
            CachedRows::Growing { visible } => {
                let query4 = heads_first(query, arch.num_heads());
                // Joined outside of the operator: NVIDIA's parser takes one without inputs and outputs for a cache.
                let (numbers, cache) = match &past.scales {
                    None => {
                        let joined =
                            |past: &Value, new| attn.concat(&[past, &heads_first(new, arch.num_kv_heads())], 2);
                        let rows = [joined(&past.rows[0], key), joined(&past.rows[1], value)];
                        (rows.clone(), LayerCache { rows, scales: None })
                    }
                    Some(scales) => {
                        let joined = [0, 1].map(|part| {
                            let new = heads_first([key, value][part], arch.num_kv_heads());
                            functions::append(attn, &past.rows[part], &scales[part], &new)
                        });
                        let scales = Some(joined.each_ref().map(|part| part.scale.clone()));
                        let rows = joined.each_ref().map(|part| part.entries.clone());
                        (joined.map(|part| part.numbers), LayerCache { rows, scales })
                    }
                };
                let mixed = query4.attention_over(&numbers[0], &numbers[1], Some(visible));
                (rows_first(&mixed, query.dim(2)), cache)
            }
            CachedRows::InPlace { past_length } => {
                let out = (DType::F32, query.shape().to_vec());
                let like = |value: &Value| (value.dtype(), value.shape().to_vec());
                let mut inputs = vec![query, key, value, &past.rows[0], &past.rows[1]];
                let mut results = vec![out, like(&past.rows[0]), like(&past.rows[1])];
                let operator = match &past.scales {
                    None => &functions::CACHED_ATTENTION,
                    Some(scales) => {
                        inputs.extend(scales);
                        results.extend(scales.iter().map(like));
                        &functions::CACHED_ATTENTION_INT8
                    }
                };
                inputs.push(past_length);
                let attributes = if past.scales.is_none() { heads(arch) } else { Vec::new() };
                let results = attn.call(operator, &inputs, attributes, results);
                let pair = |first: usize| Some([results.get(first)?.clone(), results.get(first + 1)?.clone()]);
                let rows = pair(1).unwrap_or_else(|| past.rows.clone());
                (results[0].clone(), LayerCache { rows, scales: pair(3) })
            }
            CachedRows::Fixed { visible } => {
                let (mixed, rows) = attention_beside(arch, attn, [query, key, value], visible, &past.rows);
                (mixed, LayerCache { rows, scales: None })
            }
        }
    }
}

/// Attention of one row of each sequence, queries `[batch, 1, H * d]`, keys and values `[batch, 1, G * d]`, to itself and to the
/// rows of `past [batch, G, capacity, d]` that are `visible [capacity]`. Returns the result, and key and value heads first.
///
/// Past and row are multiplied one by one, and only their scores are joined: nothing as large as the past is written. For the
/// same reason all of it is in fp32, as the past is, whatever the rest of the graph computes in.
fn attention_beside(
    arch: &Architecture,
    attn: &Scope,
    [query, key, value]: [&Value; 3],
    visible: &Value,
    past: &[Value; 2],
) -> (Value, [Value; 2]) {
    let (groups, d) = (arch.num_kv_heads(), arch.head_dim());
    let by_group =
        |x: &Value, heads: usize| x.reshape(&[x.dim(0), groups.into(), (heads / groups.max(1)).into(), d.into()]);
    let [past_key, past_value] = past.each_ref().map(|x| x.within(attn));
    let [query, key, value] = [query, key, value].map(|x| x.cast(DType::F32));
    let [key, value] = [&key, &value].map(|x| by_group(x, groups));
    let scale = attn.float((d as f32).sqrt().recip());
    let query4 = (by_group(&query, arch.num_heads()) * scale).transpose(&[0, 1, 3, 2]);
    // Keys come first, so that scores are transposed and not keys: `[batch, G, H / G, rows]`.
    let scores = |key: &Value| key.matmul(&query4).transpose(&[0, 1, 3, 2]);
    let of_past = visible.within(attn).select(&scores(&past_key), &attn.float(f32::NEG_INFINITY));
    let weights = attn.concat(&[&of_past, &scores(&key)], 3).softmax();
    let past_weights = weights.slice(3, &attn.ints(&[0]), &attn.ints(&[-1]), past_key.dim(2));
    let mixed = past_weights.matmul(&past_value) + weights.last(3) * &value;
    (mixed.reshape(query.shape()), [key, value])
}

/// Causal attention among the rows of each sequence: queries `[batch, sequence, H * d]`, keys and values `[batch,
/// sequence, G * d]`. Returns the result, and keys and values heads first. For ONNX Runtime our functions, whose kernels
/// take the projections as they are.
pub(super) fn causal_attention(
    model: &Transformer<'_>,
    attn: &Scope,
    [query, key, value]: [&Value; 3],
) -> (Value, Value, Value) {
    let arch = model.arch;
    match model.target {
        Target::Portable => {
            let query4 = heads_first(query, arch.num_heads());
            let [key, value] = [key, value].map(|x| heads_first(x, arch.num_kv_heads()));
            (rows_first(&query4.causal_attention(&key, &value), query.dim(2)), key, value)
        }
        Target::OrtCpu => {
            let out = (DType::F32, query.shape().to_vec());
            let cache = [query.dim(0), arch.num_kv_heads().into(), query.dim(1), arch.head_dim().into()];
            let cache = (DType::F32, cache.to_vec());
            let inputs = [query, key, value];
            let results =
                attn.call(&functions::CAUSAL_ATTENTION, &inputs, heads(arch), vec![out, cache.clone(), cache]);
            (results[0].clone(), results[1].clone(), results[2].clone())
        }
    }
}

fn heads(arch: &Architecture) -> Vec<(&'static str, Attribute)> {
    vec![("num_heads", arch.num_heads().into()), ("kv_num_heads", arch.num_kv_heads().into())]
}

/// `x [batch, sequence, heads * d]` as `[batch, heads, sequence, d]`.
pub(super) fn heads_first(x: &Value, heads: usize) -> Value {
    let head_dim = match x.dim(2) {
        Dim::Known(width) => width / heads.max(1),
        Dim::Symbol(_) => {
            x.scope().fail(format!("heads of {x:?}: the width has to be known"));
            1
        }
    };
    x.reshape(&[x.dim(0), x.dim(1), heads.into(), head_dim.into()]).transpose(&[0, 2, 1, 3])
}

/// `x [batch, heads, sequence, d]` as `[batch, sequence, width]`, `width = heads * d`.
pub(super) fn rows_first(x: &Value, width: Dim) -> Value {
    let rows = x.transpose(&[0, 2, 1, 3]);
    rows.reshape(&[rows.dim(0), rows.dim(1), width])
}
