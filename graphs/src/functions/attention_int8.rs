//! `GroupQueryAttentionInt8`: attention over a cache of 8-bit integers, every channel of every head of which counts in units
//! of its own, after Hooper et al., "`KVQuant`", 2024, and Liu et al., "`KIVI`", 2024: keys have channels that are large in
//! all rows.

use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope, Value};

/// The largest magnitude of an entry: -128 is left out, so that entries are symmetric.
const LEVELS: f32 = 127.0;
/// As many units as this are rounded to more than [`LEVELS`] of them.
const BEYOND: f32 = 127.5;
/// By how much a unit grows at least, so that one that grows slowly is not rounded to anew with every row.
const GROWTH: f32 = 1.25;

/// `GroupQueryAttentionInt8(query, key, value [batch, sequence, heads * d], past_key, past_value int8 [batch, G, capacity, d],
/// past_key_scale, past_value_scale [batch, G, 1, d], past_length [1]) -> output, present_key, present_value,
/// present_key_scale, present_value_scale`: as [`super::CACHED_ATTENTION`], over a cache that `append` appends to.
pub const CACHED_ATTENTION_INT8: Operator =
    Operator { name: "GroupQueryAttentionInt8", attributes: &[], body: cached_attention };

fn cached_attention(g: &Scope) {
    let projection = |name, width: &str| g.input(name, DType::F32, &["batch".into(), "sequence".into(), width.into()]);
    let query = projection("query", "q_width");
    let new = ["key", "value"].map(|name| projection(name, "kv_width"));
    let [batch, sequence, groups, head] = ["batch", "sequence", "kv_heads", "head"].map(Dim::from);
    let cache = [batch.clone(), groups.clone(), "capacity".into(), head.clone()];
    let past = ["past_key", "past_value"].map(|name| g.input(name, DType::I8, &cache));
    let per_channel = [batch.clone(), groups.clone(), 1.into(), head.clone()];
    let scales = ["past_key_scale", "past_value_scale"].map(|name| g.input(name, DType::F32, &per_channel));
    let past_length = g.input("past_length", DType::I64, &[1.into()]);

    let extent = |x: &Value, axis: usize| x.shape_at_run_time(axis, axis + 1);
    let total = &past_length + &extent(&query, 1);
    let to_groups = g.concat(&[&query.shape_at_run_time(0, 2), &extent(&past[0], 1), &extent(&past[0], 3)], 0);
    let grown = [0, 1].map(|part| {
        let new = new[part].reshape_as(&to_groups, &[batch.clone(), sequence.clone(), groups.clone(), head.clone()]);
        let valid = past[part].slice(2, &g.ints(&[0]), &past_length, "past".into());
        append(g, &valid, &scales[part], &new.transpose(&[0, 2, 1, 3]))
    });
    let to_heads = g.concat(&[&query.shape_at_run_time(0, 2), &g.ints(&[-1]), &extent(&past[0], 3)], 0);
    let query4 = query.reshape_as(&to_heads, &[batch, sequence, "heads".into(), head]).transpose(&[0, 2, 1, 3]);
    let row = g.range(&extent(&query, 1).to_scalar(), query.dim(1)) + &past_length;
    let column = g.range(&total.to_scalar(), &Dim::from("past") + &query.dim(1));
    let visible = row.unsqueeze(1).greater_or_equal(&column.unsqueeze(0));
    let mixed = query4.attention_over(&grown[0].numbers, &grown[1].numbers, Some(&visible));
    let mixed = mixed.transpose(&[0, 2, 1, 3]).reshape_as(&query.shape_at_run_time(0, 3), query.shape());
    g.output("output", &mixed);
    for (part, name) in ["present_key", "present_value"].into_iter().enumerate() {
        let room = past[part].slice(2, &total, &g.ints(&[i64::MAX]), "room".into());
        g.output(name, &g.concat(&[&grown[part].entries, &room], 2));
    }
    for (part, name) in ["present_key_scale", "present_value_scale"].into_iter().enumerate() {
        g.output(name, &grown[part].scale);
    }
}

/// A cache with new rows behind the old ones.
pub(crate) struct Appended {
    /// int8 `[batch, G, rows, d]`.
    pub(crate) entries: Value,
    /// What they count in, `[batch, G, 1, d]`.
    pub(crate) scale: Value,
    /// What they stand for, `[batch, G, rows, d]`.
    pub(crate) numbers: Value,
}

/// Rounds the rows `new [batch, G, sequence, d]` to multiples of `scale [batch, G, 1, d]` and puts them behind `past`, int8
/// `[batch, G, past, d]`.
///
/// Nothing is clipped: where a new number is beyond 127 units, the unit of its channel becomes the 127th part of the largest
/// new magnitude, and at least 5/4 of what it was, and the channel's old entries are rounded to multiples of that.
pub(crate) fn append(g: &Scope, past: &Value, scale: &Value, new: &Value) -> Appended {
    let (past, scale, new) = (past.within(g), scale.within(g), new.within(g));
    let largest = new.abs().reduce_max(2).unsqueeze(2);
    let needed = (&largest * &g.float(1.0 / LEVELS)).maximum(&(&scale * &g.float(GROWTH)));
    let grown = largest.div(&scale).less(&g.float(BEYOND)).select(&scale, &needed);
    // Quantization in units of 1: runtimes that take Q/DQ for hints want constant scales.
    let one = g.float(1.0);
    let kept = (past.dequantize(&one, None, None) * scale.div(&grown)).quantize(&one, DType::I8);
    let entries = g.concat(&[&kept, &new.div(&grown).quantize(&one, DType::I8)], 2);
    let numbers = dequantized(g, &entries, &grown);
    Appended { entries, scale: grown, numbers }
}

/// What the int8 `entries [batch, G, rows, d]` stand for in units of `scale [batch, G, 1, d]`.
pub(crate) fn dequantized(g: &Scope, entries: &Value, scale: &Value) -> Value {
    entries.within(g).dequantize(&g.float(1.0), None, None) * scale.within(g)
}
