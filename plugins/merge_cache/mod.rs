//! Merging and compacting caches in one pass: `ai.accordion::MergeCache` on the CPU. See `contract.md`.

mod operator;

pub use operator::MergeCache;

use crate::parallel::{ParallelError, ParallelFor, SharedSlice};

/// The lengths of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Sequences, B.
    pub batch: usize,
    /// Planes per sequence in the children's caches: layers, times keys and values, times heads.
    pub old_planes: usize,
    /// Planes per sequence of the node's own layers.
    pub new_planes: usize,
    /// Rows of the left cache, La.
    pub left: usize,
    /// Rows of the right cache, Lb.
    pub right: usize,
    /// Rows that both start with, P.
    pub prefix: usize,
    /// Rows that both end with, S.
    pub suffix: usize,
    /// Rows that survive, K.
    pub keep: usize,
    /// Elements of a row, d.
    pub head_dim: usize,
}

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A tensor has another size than the lengths say.
    #[error("{what} has {found} elements, expected {expected}")]
    Length {
        /// Which one.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// What the lengths say.
        expected: usize,
    },
    /// The affixes overlap in one of the caches.
    #[error("prefix_length {prefix} and suffix_length {suffix} do not fit into {rows} rows of {side}")]
    Affixes {
        /// Rows at the start.
        prefix: usize,
        /// Rows at the end.
        suffix: usize,
        /// Rows there are.
        rows: usize,
        /// Which cache.
        side: &'static str,
    },
    /// An index names no row.
    #[error("keep_idx has {index}, but the merged sequence has {rows} rows")]
    Index {
        /// The index.
        index: i64,
        /// Rows of the merged sequence.
        rows: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// Consecutive surviving rows that come from the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    source: Source,
    to: usize,
    rows: usize,
}

/// Where rows of the merged sequence come from; the numbers are the first rows in the children's caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Left(usize),
    Right(usize),
    Mean(usize, usize),
}

impl Source {
    /// Where row `row` of the merged sequence comes from.
    fn of(lengths: &Lengths, row: usize) -> Self {
        let Lengths { left, right, prefix, suffix, .. } = *lengths;
        let (left_end, merged) = (left - suffix, left + right - prefix - suffix);
        if row < prefix {
            Self::Mean(row, row)
        } else if row < left_end {
            Self::Left(row)
        } else if row < merged - suffix {
            Self::Right(prefix + row - left_end)
        } else {
            let from_end = merged - row;
            Self::Mean(left - from_end, right - from_end)
        }
    }

    /// The source of the row `ahead` rows on, if it is of the same kind.
    fn ahead(self, ahead: usize) -> Self {
        match self {
            Self::Left(row) => Self::Left(row + ahead),
            Self::Right(row) => Self::Right(row + ahead),
            Self::Mean(left, right) => Self::Mean(left + ahead, right + ahead),
        }
    }
}

fn runs(lengths: &Lengths, keep_idx: &[i64]) -> Result<Vec<Run>, MergeError> {
    let rows = lengths.left + lengths.right - lengths.prefix - lengths.suffix;
    let mut runs: Vec<Run> = Vec::new();
    for (to, &index) in keep_idx.iter().enumerate() {
        let row = usize::try_from(index).ok().filter(|&row| row < rows).ok_or(MergeError::Index { index, rows })?;
        let source = Source::of(lengths, row);
        match runs.last_mut() {
            Some(run) if run.source.ahead(run.rows) == source => run.rows += 1,
            _ => runs.push(Run { source, to, rows: 1 }),
        }
    }
    Ok(runs)
}

/// Writes the surviving rows of every plane: those of the children's caches, then `new_kv`.
///
/// # Errors
///
/// Lengths that do not belong together, an index outside the merged sequence, or threads that could not be had.
pub fn merge(
    lengths: &Lengths,
    [left_kv, right_kv]: [&[f32]; 2],
    keep_idx: &[i64],
    new_kv: &[f32],
    kv: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), MergeError> {
    let Lengths { batch, old_planes, new_planes, left, right, prefix, suffix, keep, head_dim } = *lengths;
    let planes = old_planes + new_planes;
    let sizes = [
        ("left_kv", left_kv.len(), batch * old_planes * left * head_dim),
        ("right_kv", right_kv.len(), batch * old_planes * right * head_dim),
        ("keep_idx", keep_idx.len(), batch * keep),
        ("new_kv", new_kv.len(), batch * new_planes * keep * head_dim),
        ("kv", kv.len(), batch * planes * keep * head_dim),
    ];
    if let Some(&(what, found, expected)) = sizes.iter().find(|(_, found, expected)| found != expected) {
        return Err(MergeError::Length { what, found, expected });
    }
    for (side, rows) in [("left_kv", left), ("right_kv", right)] {
        if prefix.checked_add(suffix).is_none_or(|affixes| affixes > rows) {
            return Err(MergeError::Affixes { prefix, suffix, rows, side });
        }
    }
    let sequences: Vec<Vec<Run>> =
        (0..batch).map(|b| runs(lengths, &keep_idx[b * keep..(b + 1) * keep])).collect::<Result<_, MergeError>>()?;
    let (plane, out_plane) = (head_dim, keep * head_dim);
    let kv = SharedSlice::new(kv);
    threads.run(batch * planes, &|task| {
        let (b, p) = (task / planes, task % planes);
        // SAFETY: every task writes one plane of the output, its own.
        let out = unsafe { kv.piece(task * out_plane, out_plane) };
        if let Some(new) = p.checked_sub(old_planes) {
            let start = (b * new_planes + new) * out_plane;
            out.copy_from_slice(&new_kv[start..start + out_plane]);
            return;
        }
        let old = b * old_planes + p;
        let rows = |kv: &'_ [f32], length: usize, first: usize, count: usize| -> std::ops::Range<usize> {
            debug_assert!(first + count <= length && kv.len() >= (old + 1) * length * plane);
            (old * length + first) * plane..(old * length + first + count) * plane
        };
        for run in &sequences[b] {
            let out = &mut out[run.to * plane..(run.to + run.rows) * plane];
            match run.source {
                Source::Left(row) => out.copy_from_slice(&left_kv[rows(left_kv, left, row, run.rows)]),
                Source::Right(row) => out.copy_from_slice(&right_kv[rows(right_kv, right, row, run.rows)]),
                Source::Mean(l, r) => {
                    let l = &left_kv[rows(left_kv, left, l, run.rows)];
                    let r = &right_kv[rows(right_kv, right, r, run.rows)];
                    for ((out, l), r) in out.iter_mut().zip(l).zip(r) {
                        *out = (l + r) * 0.5;
                    }
                }
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]

    use super::*;
    use crate::parallel::Threads;
    use proptest::prelude::*;

    /// The definition: the whole merged plane, then the rows that are kept.
    fn expected(lengths: &Lengths, left: &[f32], right: &[f32], keep_idx: &[i64]) -> Vec<f32> {
        let Lengths { prefix, suffix, head_dim: d, .. } = *lengths;
        let (left, right): (Vec<&[f32]>, Vec<&[f32]>) = (left.chunks(d).collect(), right.chunks(d).collect());
        let mean = |l: &[f32], r: &[f32]| l.iter().zip(r).map(|(l, r)| (l + r) * 0.5).collect::<Vec<f32>>();
        let mut merged: Vec<Vec<f32>> = (0..prefix).map(|i| mean(left[i], right[i])).collect();
        merged.extend(left[prefix..left.len() - suffix].iter().map(|row| row.to_vec()));
        merged.extend(right[prefix..right.len() - suffix].iter().map(|row| row.to_vec()));
        let ends = (0..suffix).map(|i| mean(left[left.len() - suffix + i], right[right.len() - suffix + i]));
        merged.extend(ends);
        keep_idx.iter().flat_map(|&i| merged[i as usize].clone()).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_merging_first_and_gathering_then(
            batch in 1..3_usize, old_planes in 0..5_usize, new_planes in 0..4_usize, prefix in 0..4_usize,
            suffix in 0..4_usize, contexts in [0..9_usize, 0..9_usize], head_dim in 1..6_usize, keeps: u64
        ) {
            let [left, right] = contexts.map(|context| prefix + context + suffix);
            let merged = left + right - prefix - suffix;
            let kept: Vec<i64> = (0..merged as i64).filter(|i| keeps >> (i % 64) & 1 == 1).collect();
            let keep = kept.len();
            let lengths =
                Lengths { batch, old_planes, new_planes, left, right, prefix, suffix, keep, head_dim };
            let noise = |count: usize, seed: usize| -> Vec<f32> {
                (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32).collect()
            };
            let left_kv = noise(batch * old_planes * left * head_dim, 1);
            let right_kv = noise(batch * old_planes * right * head_dim, 2);
            let new_kv = noise(batch * new_planes * keep * head_dim, 3);
            let keep_idx = kept.repeat(batch);
            let mut kv = vec![f32::NAN; batch * (old_planes + new_planes) * keep * head_dim];
            merge(&lengths, [&left_kv, &right_kv], &keep_idx, &new_kv, &mut kv, &Threads(2)).unwrap();
            for b in 0..batch {
                for p in 0..old_planes + new_planes {
                    let start = (b * (old_planes + new_planes) + p) * keep * head_dim;
                    let found = &kv[start..start + keep * head_dim];
                    if p < old_planes {
                        let plane = |kv: &[f32], rows: usize| {
                            let start = (b * old_planes + p) * rows * head_dim;
                            kv[start..start + rows * head_dim].to_vec()
                        };
                        let wanted = expected(&lengths, &plane(&left_kv, left), &plane(&right_kv, right), &kept);
                        prop_assert_eq!(found, &wanted[..]);
                    } else {
                        let start = (b * new_planes + p - old_planes) * keep * head_dim;
                        prop_assert_eq!(found, &new_kv[start..start + keep * head_dim]);
                    }
                }
            }
        }
    }

    #[test]
    fn refuses_what_does_not_belong_together() {
        let lengths = Lengths {
            batch: 1,
            old_planes: 1,
            new_planes: 0,
            left: 3,
            right: 3,
            prefix: 1,
            suffix: 1,
            keep: 2,
            head_dim: 1,
        };
        let refuse = |lengths: &Lengths, left: usize, keep_idx: &[i64]| {
            let mut kv = vec![0.0; 2];
            let sides = [&vec![0.0; left][..], &[0.0; 3]];
            merge(lengths, sides, keep_idx, &[], &mut kv, &Threads(1)).unwrap_err().to_string()
        };
        assert_eq!(refuse(&lengths, 4, &[0, 3]), "left_kv has 4 elements, expected 3");
        assert_eq!(refuse(&lengths, 3, &[0, 4]), "keep_idx has 4, but the merged sequence has 4 rows");
        assert_eq!(refuse(&lengths, 3, &[-1, 3]), "keep_idx has -1, but the merged sequence has 4 rows");
        let overlapping = Lengths { prefix: 2, suffix: 2, ..lengths };
        let message = "prefix_length 2 and suffix_length 2 do not fit into 3 rows of left_kv";
        assert_eq!(refuse(&overlapping, 3, &[0, 1]), message);
    }
}
