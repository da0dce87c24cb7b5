//! `TopKPrune`: HOMER's token reduction in the last layer of a node (methods: score, calibrate, keep the best, compact).

use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope, Value};

/// Inputs: `query_last [B, H, d]` and `key [B, G, L, d]` of the layer, both after rotation; `bias [nb]`, the layer's
/// expected score by distance; `position_ids [B, L]`; `hidden [B, L, D]`; `kv [B, n, 2, G, L, d]`, the cache of all
/// layers so far; `keep`, `prefix_length` and `suffix_length`, each `[1]`. Attribute `scale`, `1 / sqrt(d)`.
///
/// The score of row `j` is `max_h <query_last_h, key_j> * scale - bias[position_last - position_j]`; the first
/// `prefix_length` and last `suffix_length` rows are exempt. The `keep` best rows stay, in their order; among equal
/// scores the lower index wins, and NaN is below all.
///
/// Outputs: `keep_idx [B, K]`, `kept_hidden [B, K, D]`, `kept_position_ids [B, K]`, `kept_kv [B, n, 2, G, K, d]`,
/// `scores [B, L]`, `metric [B, H, L]` (the logits of the last row).
pub const TOPK_PRUNE: Operator = Operator { name: NAME, attributes: &ATTRIBUTES, body: |g| topk_prune(g, false) };

/// [`TOPK_PRUNE`] of queries, keys, hidden states and caches in any floating-point type: scores are computed in fp32.
pub const TOPK_PRUNE_16: Operator = Operator { name: NAME, attributes: &ATTRIBUTES, body: |g| topk_prune(g, true) };

const NAME: &str = "TopKPrune";
const ATTRIBUTES: [&str; 1] = ["scale"];

fn topk_prune(g: &Scope, cast: bool) {
    let dim = |name: &str| Dim::from(name);
    let [b, h, groups, l, d, n, width] = ["batch", "heads", "kv_heads", "length", "head", "layers", "width"].map(dim);
    let kept = dim("keep");
    let query = g.input("query_last", DType::F32, &[b.clone(), h.clone(), d.clone()]);
    let key = g.input("key", DType::F32, &[b.clone(), groups.clone(), l.clone(), d.clone()]);
    let bias = g.input("bias", DType::F32, &[dim("distances")]);
    let positions = g.input("position_ids", DType::I64, &[b.clone(), l.clone()]);
    let hidden = g.input("hidden", DType::F32, &[b.clone(), l.clone(), width]);
    let kv = g.input("kv", DType::F32, &[b.clone(), n.clone(), 2.into(), groups.clone(), l.clone(), d.clone()]);
    let [keep, prefix, suffix] =
        ["keep", "prefix_length", "suffix_length"].map(|name| g.input(name, DType::I64, &[1.into()]));

    let [query, key] = [query, key].map(|x| if cast { x.cast(DType::F32) } else { x });
    let metric = last_row_logits(g, &query, &key, &g.attribute("scale"));
    let distance = positions.last(1) - &positions;
    // Runtimes differ in what a maximum and an order make of NaN: the sum is NaN where a logit is, and zero elsewhere, and
    // what is ordered has none.
    let broken = metric.is_nan().select(&metric, &g.float(0.0)).reduce_sum(1);
    let scores = metric.reduce_max(1) + broken - bias.gather(&distance);

    let length = key.shape_at_run_time(2, 3);
    let row = g.range(&length.to_scalar(), l.clone());
    let exempt = row.less(&prefix).or(&row.greater_or_equal(&(&length - &suffix)));
    let scores = exempt.select(&g.float(f32::INFINITY), &scores);

    let ranked = scores.is_nan().select(&g.float(f32::NEG_INFINITY), &scores.maximum(&g.float(f32::MIN)));
    let [_, best] = ranked.top_k(&keep, true, kept.clone());
    let [keep_idx, _] = best.top_k(&keep, false, kept.clone());

    g.output("keep_idx", &keep_idx);
    g.output("kept_hidden", &hidden.gather_rows(&keep_idx, 1));
    g.output("kept_position_ids", &positions.gather_rows(&keep_idx, 1));
    g.output("kept_kv", &gather_planes(g, &kv, &keep_idx));
    g.output("scores", &scores);
    g.output("metric", &metric);
}

/// Rows `keep_idx [B, K]` of every plane of `kv [B, n, 2, G, L, d]`.
pub(super) fn gather_planes(g: &Scope, kv: &Value, keep_idx: &Value) -> Value {
    let [b, n, two, groups, l, d] = [0, 1, 2, 3, 4, 5].map(|axis| kv.dim(axis));
    let kept = keep_idx.dim(1);
    let planes = g.concat(&[&kv.shape_at_run_time(0, 1), &g.ints(&[-1]), &kv.shape_at_run_time(4, 6)], 0);
    let planar = kv.reshape_as(&planes, &[b.clone(), "planes".into(), l, d.clone()]);
    let count = keep_idx.within(g).shape_at_run_time(1, 2);
    let spread = g.concat(&[&planar.shape_at_run_time(0, 2), &count], 0);
    let spread_idx = keep_idx.within(g).unsqueeze(1).expand(&spread, &[b.clone(), "planes".into(), kept.clone()]);
    let stacked = g.concat(&[&kv.shape_at_run_time(0, 4), &count, &kv.shape_at_run_time(5, 6)], 0);
    planar.gather_rows(&spread_idx, 2).reshape_as(&stacked, &[b, n, two, groups, kept, d])
}

/// `<query_h, key_j> * scale` for every head and row: query `[B, H, d]`, key `[B, G, L, d]` -> `[B, H, L]`. The query
/// heads of a group share its keys.
pub(crate) fn last_row_logits(g: &Scope, query: &Value, key: &Value, scale: &Value) -> Value {
    let key = key.within(g);
    let [b, groups, l, d] = [0, 1, 2, 3].map(|axis| key.dim(axis));
    let grouped = g.concat(&[&key.shape_at_run_time(0, 2), &g.ints(&[-1]), &key.shape_at_run_time(3, 4)], 0);
    let query4 = query.reshape_as(&grouped, &[b.clone(), groups, "group".into(), d]);
    let logits = query4.matmul(&key.transpose(&[0, 1, 3, 2])) * scale;
    let by_head = g.concat(&[&key.shape_at_run_time(0, 1), &g.ints(&[-1]), &key.shape_at_run_time(2, 3)], 0);
    logits.reshape_as(&by_head, &[b, query.dim(1), l])
}
