//! Scores, selection and gathering in plain Rust: the gather moves nearly all the bytes, and it is memory copies.

use super::rows::Rows;
use super::{Inputs, Lengths, Outputs, PruneError};
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
use crate::simd::Level;

/// Scores the tokens of every sequence, keeps the best and gathers what belongs to them.
///
/// # Errors
///
/// Lengths that do not belong together, a tensor of another size than its shape, a distance outside the bias table, or
/// threads that could not be had. Nothing is written in the first two cases.
pub fn prune(
    lengths: &Lengths,
    inputs: &Inputs<'_>,
    outputs: Outputs<'_>,
    threads: &dyn ParallelFor,
) -> Result<(), PruneError> {
    lengths.check(inputs, &outputs)?;
    let Outputs { keep_idx, kept_hidden, kept_position_ids, kept_kv, scores, metric } = outputs;
    let Lengths { batch, heads, length, keep, hidden, .. } = *lengths;
    let distances = distances(lengths, inputs)?;
    measure(lengths, inputs, metric, threads)?;
    if length == 0 {
        return Ok(());
    }
    for b in 0..batch {
        let metric = &metric[b * heads * length..(b + 1) * heads * length];
        let scores = &mut scores[b * length..(b + 1) * length];
        score(lengths, metric, inputs.bias, &distances[b * length..(b + 1) * length], scores);
        let kept = &mut keep_idx[b * keep..(b + 1) * keep];
        select(scores, kept);
        for (to, &row) in kept_position_ids[b * keep..(b + 1) * keep].iter_mut().zip(&*kept) {
            *to = inputs.position_ids[b * length + row as usize];
        }
    }

    let kv_planes = lengths.layers * 2 * lengths.kv_heads;
    gather([length, keep, lengths.head_dim], inputs.kv, kept_kv, kv_planes, keep_idx, threads)?;
    gather([length, keep, hidden], inputs.hidden, kept_hidden, 1, keep_idx, threads)?;
    Ok(())
}

/// Distance from every token to the last one of its sequence, checked against the bias table.
fn distances(lengths: &Lengths, inputs: &Inputs<'_>) -> Result<Vec<usize>, PruneError> {
    let entries = inputs.bias.len();
    let mut distances = Vec::with_capacity(inputs.position_ids.len());
    for (batch, positions) in inputs.position_ids.chunks_exact(lengths.length.max(1)).enumerate() {
        let last = positions[positions.len() - 1];
        for (row, &position) in positions.iter().enumerate() {
            let distance = last.checked_sub(position).and_then(|d| usize::try_from(d).ok()).filter(|&d| d < entries);
            distances.push(distance.ok_or(PruneError::Distance { batch, row, position, last, entries })?);
        }
    }
    Ok(distances)
}

/// `metric[b][h][j] = scale <query[b][h], key[b][h / group][j]>`.
fn measure(
    lengths: &Lengths,
    inputs: &Inputs<'_>,
    metric: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), ParallelError> {
    let Lengths { batch, heads, kv_heads, head_dim, length, .. } = *lengths;
    let group = heads / kv_heads;
    let metric = SharedSlice::new(metric);
    threads.run(batch * kv_heads, &|task| {
        // Heads of one group are neighbours, so group `task` of all sequences owns the rows from `task * group` on.
        // SAFETY: every task has its own rows.
        let rows = unsafe { metric.piece(task * group * length, group * length) };
        let queries = &inputs.query_last[task * group * head_dim..(task + 1) * group * head_dim];
        let keys = &inputs.key[task * length * head_dim..(task + 1) * length * head_dim];
        for (j, key) in keys.chunks_exact(head_dim).enumerate() {
            for (h, query) in queries.chunks_exact(head_dim).enumerate() {
                rows[h * length + j] = dot(query, key) * inputs.scale;
            }
        }
    })
}

/// The scalar product, summed in eight strands so that it can be vectorised.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// `scores[j] = max_h metric[h][j] - bias[distance[j]]`, and infinity for the affixes.
fn score(lengths: &Lengths, metric: &[f32], bias: &[f32], distances: &[usize], scores: &mut [f32]) {
    let Lengths { length, prefix, suffix, .. } = *lengths;
    scores.fill(f32::NEG_INFINITY);
    for head in metric.chunks_exact(length) {
        for (score, &logit) in scores.iter_mut().zip(head) {
            // Written so that NaN wins: a broken logit must not hide behind the other heads.
            if logit > *score || logit.is_nan() {
                *score = logit;
            }
        }
    }
    for (score, &distance) in scores.iter_mut().zip(distances) {
        *score -= bias[distance];
    }
    scores[..prefix].fill(f32::INFINITY);
    scores[length - suffix..].fill(f32::INFINITY);
}

/// Fills `kept` with the indices of the largest scores, ascending. Of equal scores the lower index is kept; NaN ranks
/// below everything.
fn select(scores: &[f32], kept: &mut [i64]) {
    /// Small for large scores; both zeros are one, and so are minus infinity and the lowest number.
    fn rank(score: f32) -> u32 {
        if score.is_nan() {
            return u32::MAX;
        }
        let bits = (score.max(f32::MIN) + 0.0).to_bits();
        let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        !ascending
    }
    let mut ranked: Vec<(u32, usize)> = scores.iter().enumerate().map(|(j, &score)| (rank(score), j)).collect();
    if kept.len() < ranked.len() {
        ranked.select_nth_unstable(kept.len());
    }
    for (to, &(_, j)) in kept.iter_mut().zip(&ranked) {
        *to = j as i64;
    }
    kept.sort_unstable();
}

/// Copies the surviving rows of every plane: `planes` planes of `[length, width]` per sequence to as many of
/// `[keep, width]`.
fn gather(
    [length, keep, width]: [usize; 3],
    from: &[f32],
    to: &mut [f32],
    planes: usize,
    keep_idx: &[i64],
    threads: &dyn ParallelFor,
) -> Result<(), ParallelError> {
    // Few planes are cut, so that no thread waits for one that has a whole plane to copy; of many, some go together.
    let (together, parts) = ((planes / 32).clamp(1, 4), if planes >= 16 { 1 } else { 8 });
    let (shares, share) = (planes.div_ceil(together), keep.div_ceil(parts));
    let rows = Rows::new(Level::detect(), length, width, size_of_val(to));
    let batch = keep_idx.len().checked_div(keep).unwrap_or(0);
    let to = SharedSlice::new(to);
    threads.run(batch * shares * parts, &|task| {
        let (sequence, first_plane, part) = (task / parts / shares, task / parts % shares * together, task % parts);
        let count = together.min(planes - first_plane);
        let first_row = (part * share).min(keep);
        let kept = &keep_idx[sequence * keep + first_row..][..share.min(keep - first_row)];
        let plane = sequence * planes + first_plane;
        let from = &from[plane * length * width..(plane + count) * length * width];
        // SAFETY: every part of every plane is copied by one task alone, and planes that go together are not cut.
        let out = unsafe { to.piece((plane * keep + first_row) * width, count * kept.len() * width) };
        // SAFETY: survivors are rows of the planes, and the piece has as many for each of them.
        unsafe { rows.copy(from, kept, out) };
    })
}
