#![allow(clippy::unwrap_used, clippy::float_cmp)]

use super::*;
use crate::parallel::Threads;
use proptest::prelude::*;

/// Everything a call needs, owned. Keys are small integers, so that scores are exact and often equal.
#[derive(Debug, Clone)]
struct Case {
    lengths: Lengths,
    query_last: Vec<f32>,
    key: Vec<f32>,
    bias: Vec<f32>,
    position_ids: Vec<i64>,
    hidden: Vec<f32>,
    kv: Vec<f32>,
}

#[derive(Debug, PartialEq)]
struct Pruned {
    keep_idx: Vec<i64>,
    kept_hidden: Vec<f32>,
    kept_position_ids: Vec<i64>,
    kept_kv: Vec<f32>,
    scores: Vec<f32>,
    metric: Vec<f32>,
}

impl Case {
    fn new(lengths: Lengths, seed: u64) -> Self {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, .. } = lengths;
        let mut state = seed;
        let mut next = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut integers = |count: usize| (0..count).map(|_| next(5) as f32 - 2.0).collect::<Vec<f32>>();
        let query_last = integers(batch * heads * head_dim);
        let key = integers(batch * kv_heads * length * head_dim);
        let bias = integers(3 * length + 1);
        Self {
            lengths,
            query_last,
            key,
            bias,
            // Gaps, duplicates and an order that is not ascending, as after a merge; the last is the largest.
            position_ids: (0..batch * length)
                .map(|i| match i % length {
                    j if j + 1 == length => 3 * length as i64,
                    j => ((j * 7) % length + j) as i64,
                })
                .collect(),
            hidden: (0..batch * length * hidden).map(|i| i as f32).collect(),
            kv: (0..batch * layers * 2 * kv_heads * length * head_dim).map(|i| i as f32 * 0.5).collect(),
        }
    }

    fn prune(&self, threads: usize) -> Result<Pruned, String> {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, .. } = self.lengths;
        let keep = keep.min(length);
        let mut pruned = Pruned {
            keep_idx: vec![-1; batch * keep],
            kept_hidden: vec![f32::NAN; batch * keep * hidden],
            kept_position_ids: vec![-1; batch * keep],
            kept_kv: vec![f32::NAN; batch * layers * 2 * kv_heads * keep * head_dim],
            scores: vec![f32::NAN; batch * length],
            metric: vec![f32::NAN; batch * heads * length],
        };
        prune(
            &self.lengths,
            &Inputs {
                query_last: &self.query_last,
                key: &self.key,
                bias: &self.bias,
                position_ids: &self.position_ids,
                hidden: &self.hidden,
                kv: &self.kv,
                scale: 0.5,
            },
            Outputs {
                keep_idx: &mut pruned.keep_idx,
                kept_hidden: &mut pruned.kept_hidden,
                kept_position_ids: &mut pruned.kept_position_ids,
                kept_kv: &mut pruned.kept_kv,
                scores: &mut pruned.scores,
                metric: &mut pruned.metric,
            },
            &Threads(threads),
        )
        .map(|()| pruned)
        .map_err(|error| error.to_string())
    }

    /// The definition, row by row: a stable sort by falling score.
    fn expected(&self) -> Pruned {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, prefix, suffix } = self.lengths;
        let (mut scores, mut metric, mut keep_idx) = (Vec::new(), Vec::new(), Vec::new());
        for b in 0..batch {
            let logit = |h: usize, j: usize| {
                let key = (b * kv_heads + h / (heads / kv_heads)) * length + j;
                let dot: f32 = (0..head_dim)
                    .map(|c| self.query_last[(b * heads + h) * head_dim + c] * self.key[key * head_dim + c])
                    .sum();
                dot * 0.5
            };
            metric.extend((0..heads).flat_map(|h| (0..length).map(move |j| (h, j))).map(|(h, j)| logit(h, j)));
            let positions = &self.position_ids[b * length..(b + 1) * length];
            let row: Vec<f32> = (0..length)
                .map(|j| {
                    if j < prefix || j >= length - suffix {
                        return f32::INFINITY;
                    }
                    let max = (0..heads).map(|h| logit(h, j)).fold(f32::NEG_INFINITY, f32::max);
                    max - self.bias[(positions[length - 1] - positions[j]) as usize]
                })
                .collect();
            let mut order: Vec<usize> = (0..length).collect();
            order.sort_by(|&i, &j| row[j].partial_cmp(&row[i]).unwrap());
            order.truncate(keep);
            order.sort_unstable();
            keep_idx.extend(order.iter().map(|&j| j as i64));
            scores.extend(row);
        }
        let rows = |planes: usize, width: usize, data: &[f32]| {
            let mut out = Vec::new();
            for plane in 0..batch * planes {
                for &j in &keep_idx[plane / planes * keep..][..keep] {
                    out.extend_from_slice(&data[(plane * length + j as usize) * width..][..width]);
                }
            }
            out
        };
        Pruned {
            kept_hidden: rows(1, hidden, &self.hidden),
            kept_kv: rows(layers * 2 * kv_heads, head_dim, &self.kv),
            kept_position_ids: keep_idx
                .iter()
                .enumerate()
                .map(|(i, &j)| self.position_ids[i / keep.max(1) * length + j as usize])
                .collect(),
            keep_idx,
            scores,
            metric,
        }
    }
}

const SMALL: Lengths = Lengths {
    batch: 1,
    heads: 2,
    kv_heads: 1,
    head_dim: 4,
    length: 6,
    hidden: 3,
    layers: 2,
    keep: 4,
    prefix: 1,
    suffix: 1,
};

fn lengths() -> impl Strategy<Value = Lengths> {
    (1usize..3, 1usize..4, 1usize..4, 1usize..20, 1usize..600, 1usize..6, 1usize..12).prop_flat_map(
        |(batch, kv_heads, group, head_dim, length, hidden, layers)| {
            (0..=length).prop_flat_map(move |keep| {
                (0..=keep).prop_flat_map(move |prefix| {
                    (0..=keep - prefix).prop_map(move |suffix| Lengths {
                        batch,
                        heads: kv_heads * group,
                        kv_heads,
                        head_dim,
                        length,
                        hidden,
                        layers,
                        keep,
                        prefix,
                        suffix,
                    })
                })
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_definition(lengths in lengths(), seed in any::<u64>(), threads in 1usize..4) {
        let case = Case::new(lengths, seed);
        prop_assert_eq!(case.prune(threads).unwrap(), case.expected());
    }
}

#[test]
fn of_equal_scores_the_lower_index_stays() {
    let mut case = Case::new(SMALL, 1);
    case.query_last.fill(0.0);
    case.bias.fill(0.0);
    assert_eq!(case.prune(1).unwrap().keep_idx, [0, 1, 2, 5]);
}

#[test]
fn keeping_all_changes_nothing_and_keeping_the_affixes_keeps_them() {
    let case = Case::new(Lengths { keep: 6, ..SMALL }, 2);
    let all = case.prune(2).unwrap();
    assert_eq!(all.keep_idx, [0, 1, 2, 3, 4, 5]);
    assert_eq!((all.kept_hidden, all.kept_kv), (case.hidden, case.kv));
    let affixes = Case::new(Lengths { keep: 3, prefix: 2, ..SMALL }, 3);
    assert_eq!(affixes.prune(1).unwrap().keep_idx, [0, 1, 5]);
}

#[test]
fn nan_goes_first() {
    let mut case = Case::new(Lengths { keep: 5, ..SMALL }, 4);
    case.key[3 * SMALL.head_dim] = f32::NAN;
    let pruned = case.prune(1).unwrap();
    assert!(pruned.scores[3].is_nan());
    assert_eq!(pruned.keep_idx, [0, 1, 2, 4, 5]);
}

#[test]
fn refuses_what_does_not_fit() {
    let refused = |lengths: Lengths| Case::new(lengths, 5).prune(1).unwrap_err();
    assert!(refused(Lengths { keep: 7, ..SMALL }).contains("keep is 7, but there are 6 tokens"));
    assert!(refused(Lengths { prefix: 4, ..SMALL }).contains("at least prefix_length 4 plus suffix_length 1"));
    assert!(refused(Lengths { prefix: usize::MAX, ..SMALL }).contains("prefix_length"));
    assert!(refused(Lengths { heads: 3, kv_heads: 2, ..SMALL }).contains("3 query heads"));

    let mut short = Case::new(SMALL, 6);
    short.bias.truncate(18);
    let message = short.prune(1).unwrap_err();
    assert!(message.contains("token 0 is at position 0 and the last one at 18"), "{message}");
    assert!(message.contains("distance of 0 to 17"), "{message}");
    let mut later = Case::new(SMALL, 7);
    later.position_ids[2] = 19;
    assert!(later.prune(1).unwrap_err().contains("token 2 is at position 19"));
    let mut extreme = Case::new(SMALL, 7);
    extreme.position_ids[2] = i64::MIN;
    assert!(extreme.prune(1).unwrap_err().contains("token 2"));
    let mut missing = Case::new(SMALL, 8);
    missing.kv.pop();
    assert_eq!(missing.prune(1).unwrap_err(), "kv has 95 elements, expected 96");
}
