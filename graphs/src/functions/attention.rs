//! `GroupQueryAttention` for ONNX Runtime on CPU: causal attention over its contributed operator of that name, which
//! skips the masked half and can append to a cache in place. A function's inputs are all there, so the operator has two
//! forms, with and without a past; a graph uses one of them.

use crate::dtype::DType;
use crate::onnx::{Attribute, Dim, Operator, Scope, Value};

const NAME: &str = "GroupQueryAttention";
const NAME_BF16: &str = "GroupQueryAttentionBf16";
const HEADS: [&str; 2] = ["num_heads", "kv_num_heads"];

/// Queries, keys and values of one call: `[batch, sequence, heads * d]`.
fn projections(g: &Scope) -> [Value; 3] {
    let input = |name, width: &str| g.input(name, DType::F32, &["batch".into(), "sequence".into(), width.into()]);
    [input("query", "q_width"), input("key", "kv_width"), input("value", "kv_width")]
}

/// The contributed operator; `total [1]` is the number of rows attended to by the last query.
fn group_query_attention(g: &Scope, [q, k, v]: &[Value; 3], past: Option<[&Value; 2]>, total: &Value, capacity: Dim) {
    let batch = q.shape_at_run_time(0, 1);
    let last = (total - &g.ints(&[1])).expand(&batch, &["batch".into()]).cast(DType::I32);
    let total = total.to_scalar().cast(DType::I32);
    let cache = vec![Dim::from("batch"), "kv_heads".into(), capacity, "head".into()];
    let results = vec![(DType::F32, q.shape().to_vec()), (DType::F32, cache.clone()), (DType::F32, cache)];
    let inputs = [Some(q), Some(k), Some(v), past.map(|p| p[0]), past.map(|p| p[1]), Some(&last), Some(&total)];
    let attributes = HEADS.iter().map(|&name| (name, Attribute::IntOf(name))).collect();
    let outputs = g.contributed(NAME, &inputs, attributes, results);
    for (name, value) in ["output", "present_key", "present_value"].iter().zip(&outputs) {
        g.output(name, value);
    }
}

/// `GroupQueryAttention(query, key, value) -> output, present_key, present_value`: row `t` attends to rows `0 ..= t`. The
/// keys and values come out heads first, `[batch, G, sequence, d]`.
pub const CAUSAL_ATTENTION: Operator = Operator { name: NAME, attributes: &HEADS, body: causal_attention };

fn causal_attention(g: &Scope) {
    causal(g, &projections(g));
}

/// [`CAUSAL_ATTENTION`] over queries, keys and values that are rounded to bfloat16: so are the keys and values that come out.
/// Graphs whose linear layers round activations to 8 bits have it in place of the other.
pub const CAUSAL_ATTENTION_BF16: Operator =
    Operator { name: NAME_BF16, attributes: &HEADS, body: |g| causal(g, &projections(g).map(|x| rounded(&x))) };

fn causal(g: &Scope, qkv: &[Value; 3]) {
    let rows = qkv[0].shape_at_run_time(1, 2);
    group_query_attention(g, qkv, None, &rows, "sequence".into());
}

/// The nearest numbers of type bfloat16.
fn rounded(x: &Value) -> Value {
    x.cast(DType::Bf16).cast(DType::F32)
}

/// `GroupQueryAttention(query, key, value, past_key, past_value, past_length [1])`: as [`CAUSAL_ATTENTION`], after the first
/// `past_length` rows of a cache `[batch, G, capacity, d]`. The new rows are written behind them; a caller that binds
/// past and present to one buffer appends in place.
pub const CACHED_ATTENTION: Operator = Operator { name: NAME, attributes: &HEADS, body: cached_attention };

fn cached_attention(g: &Scope) {
    cached(g, &projections(g));
}

/// [`CACHED_ATTENTION`] over queries and new keys and values that are rounded to bfloat16: so are those that are written
/// behind the past, which is taken as it is.
pub const CACHED_ATTENTION_BF16: Operator =
    Operator { name: NAME_BF16, attributes: &HEADS, body: |g| cached(g, &projections(g).map(|x| rounded(&x))) };

fn cached(g: &Scope, qkv: &[Value; 3]) {
    let cache = ["batch".into(), "kv_heads".into(), "capacity".into(), "head".into()];
    let past = ["past_key", "past_value"].map(|name| g.input(name, DType::F32, &cache));
    let past_length = g.input("past_length", DType::I64, &[1.into()]);
    let total = past_length + qkv[0].shape_at_run_time(1, 2);
    group_query_attention(g, qkv, Some([&past[0], &past[1]]), &total, "capacity".into());
}
