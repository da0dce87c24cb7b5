//! The baseline, and what every method ends in: a decoder that continues from a cache.

use super::layers::{Layers, injected_rows, past_rows};
use super::{Graphs, Source};
use crate::blocks::{CachedRows, LayerCache, Rows, Target, unflatten};
use crate::dtype::DType;
use crate::onnx::{Dim, Scope, Value};
use crate::precision::KvCache;

/// Name of the decoder's graph.
pub const DECODER: &str = "decoder";
/// Name of the graph of the decoder whose cache holds 8-bit integers.
pub const DECODER_KV_INT8: &str = "decoder_kv_int8";

/// The graphs of the method.
pub fn graphs(source: &Source) -> Graphs {
    Graphs::from([(DECODER.to_owned(), decoder(source, 0, KvCache::Fp32))])
}

/// The decoder with past, under the names the ecosystem uses.
///
/// Inputs: `input_ids` and `position_ids [batch, sequence]`, `num_logits_to_keep [1]`, and per layer
/// `past_key_values.<l>.key` and `.value`. Outputs: `logits [batch, kept, V]` of the last `num_logits_to_keep` rows and
/// per layer `present.<l>.key` and `.value`.
///
/// The portable cache is `[batch, G, past, d]` and grows by `sequence`. For ONNX Runtime on CPU it is
/// `[batch, G, capacity, d]` with an input `past_length [1]`, and past and present may be one buffer.
///
/// The bottom `injected_layers` attend to a compressed context between attention and MLP, if there are any: inputs
/// `injected.<l>.key` and `.value [batch, G, injected, d]`, as [`crate::blocks::Transformer::cross_attend`] takes them.
///
/// With a cache of 8-bit integers, past, present and injected keys and values are int8, each with the input or output
/// `<name>_scale [batch, G, 1, d]` that its entries count in; see [`crate::functions::CACHED_ATTENTION_INT8`].
pub fn decoder(source: &Source, injected_layers: usize, kv_cache: KvCache) -> Scope {
    let g = source.graph(match kv_cache {
        KvCache::Fp32 => DECODER,
        KvCache::Int8 => DECODER_KV_INT8,
    });
    let (arch, model) = (&source.arch, source.decoder());
    let [batch, sequence] = [Dim::from("batch"), Dim::from("sequence")];
    let rows_of = |name| g.input(name, DType::I64, &[batch.clone(), sequence.clone()]);
    let (ids, positions) = (rows_of("input_ids"), rows_of("position_ids"));
    let keep = g.input("num_logits_to_keep", DType::I64, &[1.into()]);
    let (past, cache) = past_inputs(&g, source, arch.num_layers(), &positions, kv_cache);
    let injected = injected_rows(&g, source, injected_layers, batch.clone(), kv_cache);
    let rows = Rows::new(&g, &model, &positions, cache);
    let layers = Layers { model: &model, positions: &positions, rows, past: &past, injected: &injected };
    let pick = |x: &Value| last_rows(x, &positions, &keep);
    let x = layers.run(&g, &ids, pick, |l, attended| {
        g.output(&format!("present.{l}.key"), &attended.key);
        g.output(&format!("present.{l}.value"), &attended.value);
        for (part, scale) in ["key", "value"].iter().zip(attended.scales.iter().flatten()) {
            g.output(&format!("present.{l}.{part}_scale"), scale);
        }
    });
    let kept = g.concat(&[&positions.shape_at_run_time(0, 1), &g.ints(&[-1, arch.vocab_size() as i64])], 0);
    let logits = model.head(&g, &x).within(&g).reshape_as(&kept, &[batch, "kept".into(), arch.vocab_size().into()]);
    g.output("logits", &logits);
    g
}

/// Inputs for the cache of the first `layers` layers before rows at `positions [batch, sequence]`: the keys and values of
/// each, and how the rows see them.
pub(super) fn past_inputs(
    g: &Scope,
    source: &Source,
    layers: usize,
    positions: &Value,
    kv_cache: KvCache,
) -> (Vec<LayerCache>, Option<CachedRows>) {
    let (extent, in_place) = match source.target {
        Target::OrtCpu => ("capacity", Some(g.input("past_length", DType::I64, &[1.into()]))),
        Target::Portable => ("past", None),
    };
    let past = past_rows(g, &source.arch, layers, [positions.dim(0), extent.into()], kv_cache);
    let cache = in_place.map_or_else(
        || past.first().map(|past| CachedRows::Growing { visible: visible_rows(g, &past.rows[0], positions) }),
        |past_length| Some(CachedRows::InPlace { past_length }),
    );
    (past, cache)
}

/// `[sequence, past + sequence]`: new row `t` sees the past and the new rows up to itself.
fn visible_rows(g: &Scope, past_key: &Value, positions: &Value) -> Value {
    let g = g.scope("visible");
    let past = past_key.within(&g).shape_at_run_time(2, 3);
    let new = positions.within(&g).shape_at_run_time(1, 2);
    let (past_dim, new_dim) = (past_key.dim(2), positions.dim(1));
    let row = g.range(&new.to_scalar(), new_dim.clone()) + &past;
    let column = g.range(&(&past + &new).to_scalar(), &past_dim + &new_dim);
    row.unsqueeze(1).greater_or_equal(&column.unsqueeze(0))
}

/// The last `keep [1]` rows of every batch entry of `x [batch * sequence, D]`.
fn last_rows(x: &Value, positions: &Value, keep: &Value) -> Value {
    let g = x.scope();
    let start = g.ints(&[0]) - keep;
    unflatten(x, positions).slice(1, &start, &g.ints(&[i64::MAX]), "kept".into()).flatten_rows()
}

/// Logits of hidden states that a context graph left: `hidden [batch, sequence, D] -> logits [batch, sequence, V]`.
pub fn output_head(source: &Source) -> Scope {
    let g = source.graph("head");
    let arch = &source.arch;
    let hidden = g.input("hidden", DType::F32, &["batch".into(), "sequence".into(), arch.hidden_size().into()]);
    let shape = g.concat(&[&hidden.shape_at_run_time(0, 2), &g.ints(&[arch.vocab_size() as i64])], 0);
    let logits = source.decoder().head(&g, &hidden.flatten_rows()).within(&g);
    g.output("logits", &logits.reshape_as(&shape, &[hidden.dim(0), hidden.dim(1), arch.vocab_size().into()]));
    g
}
