//! Attention: causal by row index, or to everything.

use super::Result;
use super::array::Scope;
use super::cache::KeyValue;
use super::rope::Rotary;
use ndarray::{Array2, Array3, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use std::thread;

/// Query rows whose scores exist at one time: bounds the memory of a head to this many rows of the score matrix.
const ROWS_AT_ONCE: usize = 256;

/// Rotates new rows `q [H, L, d]` and `k [G, L, d]`, puts `k` and `v` behind `past` and attends. Returns what is attended
/// to, `[L, H * d]`, the rotated queries, and keys and values of all rows.
pub(super) fn attend(
    q: &Array3<f32>,
    k: &Array3<f32>,
    v: Array3<f32>,
    rotary: &Rotary,
    past: Option<&KeyValue>,
    taps: &mut Scope<'_>,
) -> Result<(Array2<f32>, Array3<f32>, KeyValue)> {
    let q = rotary.apply(q);
    let mut kv = KeyValue::new(rotary.apply(k), v);
    taps.tap_rows("attn.q", &q)?;
    taps.tap_rows("attn.k", &kv.k)?;
    taps.tap_rows("attn.v", &kv.v)?;
    if let Some(past) = past {
        let new = std::mem::replace(&mut kv, past.clone());
        kv.append(&new);
    }
    let attended = causal_attention(&q, &kv.k, &kv.v);
    taps.tap("attn.out", &attended)?;
    Ok((attended, q, kv))
}

/// As [`attend`] for rows of which only `tokens` are no padding. Padding is not attended to, and what it attends to is zero;
/// its keys and values are among the result all the same.
pub(super) fn attend_among(
    tokens: &[usize],
    q: &Array3<f32>,
    k: &Array3<f32>,
    v: Array3<f32>,
    rotary: &Rotary,
    taps: &mut Scope<'_>,
) -> Result<(Array2<f32>, KeyValue)> {
    let q = rotary.apply(q);
    let kv = KeyValue::new(rotary.apply(k), v);
    taps.tap_rows("attn.q", &q)?;
    taps.tap_rows("attn.k", &kv.k)?;
    taps.tap_rows("attn.v", &kv.v)?;
    let seen = kv.select(tokens);
    let found = causal_attention(&q.select(Axis(1), tokens), &seen.k, &seen.v);
    let mut attended = Array2::zeros((kv.rows(), found.ncols()));
    for (&row, found) in tokens.iter().zip(found.rows()) {
        attended.row_mut(row).assign(&found);
    }
    taps.tap("attn.out", &attended)?;
    Ok((attended, kv))
}

/// Attention of `q [H, L, d]` over `k, v [G, R, d]`, `R >= L`; returns `[L, H * d]`.
///
/// The queries are the last `L` of the `R` rows. Row `i` sees rows `0 ..= i`, whatever their position ids: after a
/// merge, position ids no longer grow with the row. Scores are scaled by `1 / sqrt(d)`.
pub(super) fn causal_attention(q: &Array3<f32>, k: &Array3<f32>, v: &Array3<f32>) -> Array2<f32> {
    let past = k.len_of(Axis(1)) - q.len_of(Axis(1));
    attention(q, k, v, &|row| past + row + 1)
}

/// Attention of `q [H, L, d]` over `k, v [G, R, d]`, every row of which every query sees; returns `[L, H * d]`. Scores are
/// scaled by `1 / sqrt(d)`.
pub(super) fn full_attention(q: &Array3<f32>, k: &Array3<f32>, v: &Array3<f32>) -> Array2<f32> {
    let rows = k.len_of(Axis(1));
    attention(q, k, v, &|_| rows)
}

/// Attention where query `row` sees the first `seen(row)` rows of `k` and `v`, which never become fewer.
fn attention(
    q: &Array3<f32>,
    k: &Array3<f32>,
    v: &Array3<f32>,
    seen: &(impl Fn(usize) -> usize + Sync),
) -> Array2<f32> {
    let (heads, rows, dim) = q.dim();
    let queries_per_key = heads / k.len_of(Axis(0));
    let mut out = Array3::<f32>::zeros((heads, rows, dim));
    let workers = thread::available_parallelism().map_or(1, usize::from).min(heads);
    thread::scope(|scope| {
        let share = heads.div_ceil(workers);
        for (worker, mut outs) in out.axis_chunks_iter_mut(Axis(0), share).enumerate() {
            scope.spawn(move || {
                for (offset, out) in outs.outer_iter_mut().enumerate() {
                    let head = worker * share + offset;
                    let group = head / queries_per_key;
                    let [q, k, v] = [(q, head), (k, group), (v, group)].map(|(x, i)| x.index_axis(Axis(0), i));
                    one_head(&q, &k, &v, seen, out);
                }
            });
        }
    });
    let by_row = out.permuted_axes([1, 0, 2]);
    Array2::from_shape_fn((rows, heads * dim), |(row, column)| by_row[[row, column / dim, column % dim]])
}

fn one_head(
    q: &ArrayView2<'_, f32>,
    k: &ArrayView2<'_, f32>,
    v: &ArrayView2<'_, f32>,
    seen: &impl Fn(usize) -> usize,
    mut out: ArrayViewMut2<'_, f32>,
) {
    let (rows, dim) = q.dim();
    let scale = 1.0 / (dim as f32).sqrt();
    for start in (0..rows).step_by(ROWS_AT_ONCE) {
        let end = (start + ROWS_AT_ONCE).min(rows);
        let visible = seen(end - 1);
        let mut scores = q.slice(s![start..end, ..]).dot(&k.slice(s![..visible, ..]).t());
        for (row, mut scores) in (start..).zip(scores.rows_mut()) {
            let (shown, mut hidden) = scores.view_mut().split_at(Axis(0), seen(row));
            softmax(shown, scale);
            hidden.fill(0.0);
        }
        out.slice_mut(s![start..end, ..]).assign(&scores.dot(&v.slice(s![..visible, ..])));
    }
}

/// Softmax of `scale * scores`, in place.
fn softmax(mut scores: ArrayViewMut1<'_, f32>, scale: f32) {
    let largest = scores.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    scores.mapv_inplace(|score| ((score - largest) * scale).exp());
    let sum = scores.sum();
    scores.mapv_inplace(|weight| weight / sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64 and one score at a time; query `row` sees `seen(row)` rows.
    fn by_definition(q: &Array3<f32>, k: &Array3<f32>, v: &Array3<f32>, seen: impl Fn(usize) -> usize) -> Array2<f32> {
        let (heads, rows, dim) = q.dim();
        let group = |head| head / (heads / k.dim().0);
        Array2::from_shape_fn((rows, heads * dim), |(row, column)| {
            let (head, e) = (column / dim, column % dim);
            let weight = |j: usize| {
                let dot: f64 = (0..dim).map(|c| f64::from(q[[head, row, c]] * k[[group(head), j, c]])).sum();
                (dot / (dim as f64).sqrt()).exp()
            };
            let total: f64 = (0..seen(row)).map(weight).sum();
            ((0..seen(row)).map(|j| weight(j) * f64::from(v[[group(head), j, e]])).sum::<f64>() / total) as f32
        })
    }

    #[test]
    fn grouped_heads_past_rows_and_several_blocks_follow_the_definition() {
        let wave =
            |seed: usize| move |(h, r, c): (usize, usize, usize)| ((seed + h * 37 + r * 11 + c * 5) as f32).sin();
        for (heads, groups, past, rows) in [(3, 1, 0, 5), (4, 2, 7, 1), (2, 2, 3, ROWS_AT_ONCE + 9)] {
            let q = Array3::from_shape_fn((heads, rows, 4), wave(1));
            let k = Array3::from_shape_fn((groups, past + rows, 4), wave(2));
            let v = Array3::from_shape_fn((groups, past + rows, 4), wave(3));
            let causal = causal_attention(&q, &k, &v) - by_definition(&q, &k, &v, |row| past + row + 1);
            let full = full_attention(&q, &k, &v) - by_definition(&q, &k, &v, |_| past + rows);
            let worst = causal.iter().chain(&full).fold(0.0_f32, |worst, e| worst.max(e.abs()));
            assert!(worst < 2e-6, "{heads}/{groups} heads, {past} + {rows} rows: {worst}");
        }
    }
}
