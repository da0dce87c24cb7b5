//! What the graphs of a decoder have in common: its inputs for keys and values, and the layers over them.

use super::Source;
use crate::architecture::Architecture;
use crate::blocks::{Attended, LayerCache, Rows, Transformer};
use crate::dtype::DType;
use crate::functions::dequantized;
use crate::onnx::{Dim, Scope, Value};
use crate::precision::KvCache;

/// All layers of a decoder, over rows behind a cache.
pub(super) struct Layers<'a> {
    /// The decoder.
    pub model: &'a Transformer<'a>,
    /// Where the rows are, `[batch, sequence]`.
    pub positions: &'a Value,
    /// How the rows see the cache.
    pub rows: Rows<'a>,
    /// The cache of every layer.
    pub past: &'a [LayerCache],
    /// What the bottom layers attend to besides.
    pub injected: &'a [[Value; 2]],
}

impl Layers<'_> {
    /// The last layer's output for tokens `ids [batch, sequence]`, `[rows, D]`: of the rows that `pick` leaves of `[batch *
    /// sequence, D]`. `attended` gets what attention yields, layer by layer.
    pub(super) fn run(
        &self,
        g: &Scope,
        ids: &Value,
        pick: impl Fn(&Value) -> Value,
        mut attended: impl FnMut(usize, &Attended),
    ) -> Value {
        let Self { model, positions, rows, past, injected } = self;
        let mut x = model.embed(g, ids);
        g.tap("embed", &x);
        for (l, past) in past.iter().enumerate() {
            let layer = model.layer(g, l);
            let found = rows.attend(&layer, &x, Some(past));
            attended(l, &found);
            let residual = match injected.get(l) {
                Some(context) => model.cross_attend(&layer, &found.residual, positions, context.each_ref()),
                None => found.residual,
            };
            // Only the last layer's cache needs all rows; its MLP is run for the rows whose logits are asked for.
            let residual = if l + 1 == model.architecture().num_layers() { residual.pick(&pick) } else { residual };
            x = model.mlp_residual(&layer, &residual);
        }
        x
    }
}

/// Inputs for the keys and values of one layer, `shape` being `[batch, G, rows, d]`.
pub(super) fn cache_input(g: &Scope, name: &str, shape: &[Dim; 4], kv_cache: KvCache) -> LayerCache {
    let both = |suffix: &str, dtype, shape: &[Dim; 4]| {
        ["key", "value"].map(|part| g.input(&format!("{name}.{part}{suffix}"), dtype, shape))
    };
    let [batch, groups, _, width] = shape.clone();
    match kv_cache {
        KvCache::Fp32 => LayerCache { rows: both("", DType::F32, shape), scales: None },
        KvCache::Int8 => LayerCache {
            rows: both("", DType::I8, shape),
            scales: Some(both("_scale", DType::F32, &[batch, groups, 1.into(), width])),
        },
    }
}

/// The inputs `past_key_values.<l>` of the first `layers` layers, with `extent` rows for every entry of `batch`.
pub(super) fn past_rows(
    g: &Scope,
    arch: &Architecture,
    layers: usize,
    [batch, extent]: [Dim; 2],
    kv_cache: KvCache,
) -> Vec<LayerCache> {
    let shape = [batch, arch.num_kv_heads().into(), extent, arch.head_dim().into()];
    (0..layers).map(|l| cache_input(g, &format!("past_key_values.{l}"), &shape, kv_cache)).collect()
}

/// The inputs `injected.<l>` of the bottom `layers` layers, as the numbers they stand for.
pub(super) fn injected_rows(
    g: &Scope,
    source: &Source,
    layers: usize,
    batch: Dim,
    kv_cache: KvCache,
) -> Vec<[Value; 2]> {
    let arch = &source.arch;
    let shape = [batch, arch.num_kv_heads().into(), "injected".into(), arch.head_dim().into()];
    (0..layers)
        .map(|l| {
            let LayerCache { rows, scales } = cache_input(g, &format!("injected.{l}"), &shape, kv_cache);
            match scales {
                None => rows,
                Some(scales) => [0, 1].map(|part| dequantized(g, &rows[part], &scales[part])),
            }
        })
        .collect()
}
