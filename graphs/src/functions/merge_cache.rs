//! `MergeCache`: what survives of the children's caches, followed by the node's own.

use super::topk_prune::gather_planes;
use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope, Value};

/// Inputs: `left_kv [B, m, 2, G, La, d]`, `right_kv [B, m, 2, G, Lb, d]`, `keep_idx [B, K]` (rows of the merged sequence),
/// `new_kv [B, n, 2, G, K, d]`, `prefix_length` and `suffix_length`, each `[1]`. Output: `kv [B, m + n, 2, G, K, d]`.
pub const MERGE_CACHE: Operator = Operator { name: "MergeCache", attributes: &[], body: merge_cache };

fn merge_cache(g: &Scope) {
    let cache = |name: &str, layers: &str, rows: &str| {
        let shape = ["batch", layers, "2", "kv_heads", rows, "head"]
            .map(|dim| if dim == "2" { Dim::Known(2) } else { Dim::from(dim) });
        g.input(name, DType::F32, &shape)
    };
    let (left, right) = (cache("left_kv", "old_layers", "left"), cache("right_kv", "old_layers", "right"));
    let keep_idx = g.input("keep_idx", DType::I64, &["batch".into(), "keep".into()]);
    let new = cache("new_kv", "new_layers", "keep");
    let affixes = ["prefix_length", "suffix_length"].map(|name| g.input(name, DType::I64, &[1.into()]));
    let merged = merge_rows(g, &left, &right, 4, [&affixes[0], &affixes[1]]);
    g.output("kv", &g.concat(&[&gather_planes(g, &merged, &keep_idx), &new], 1));
}

/// `concat((A.prefix + B.prefix) / 2, A.context, B.context, (A.suffix + B.suffix) / 2)` along `axis`.
pub(crate) fn merge_rows(g: &Scope, a: &Value, b: &Value, axis: usize, [prefix, suffix]: [&Value; 2]) -> Value {
    let (prefix, suffix) = (prefix.within(g), suffix.within(g));
    let zero = g.ints(&[0]);
    // Counted from the start: without a suffix, nothing is 0 from the end.
    let [a_rows, b_rows] = [a, b].map(|x| {
        let rows = x.within(g).shape_at_run_time(axis, axis + 1);
        (&rows - &suffix, rows)
    });
    let part = |x: &Value, from: &Value, to: &Value, name: &str| x.within(g).slice(axis, from, to, name.into());
    let before = part(a, &zero, &prefix, "prefix").mean(&part(b, &zero, &prefix, "prefix"));
    let after = part(a, &a_rows.0, &a_rows.1, "suffix").mean(&part(b, &b_rows.0, &b_rows.1, "suffix"));
    let (a_context, b_context) =
        (part(a, &prefix, &a_rows.0, "left_context"), part(b, &prefix, &b_rows.0, "right_context"));
    g.concat(&[&before, &a_context, &b_context, &after], axis)
}
