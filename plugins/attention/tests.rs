#![allow(clippy::unwrap_used, clippy::float_cmp)]

use super::*;
use crate::parallel::Threads;
use proptest::prelude::*;

/// A splitmix64 stream of values in `[-1, 1)`.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Attention by its definition, in f64, over caches that are already complete.
fn naive(geometry: &Geometry, query: &[f32], key: &[f32], value: &[f32], scale: f32) -> Vec<f64> {
    let Geometry { batch, rows, heads, kv_heads, head_dim, past, capacity } = *geometry;
    let mut output = vec![0.0; batch * rows * heads * head_dim];
    for b in 0..batch {
        for t in 0..rows {
            for h in 0..heads {
                let at = ((b * rows + t) * heads + h) * head_dim;
                let cache = (b * kv_heads + h / (heads / kv_heads)) * capacity * head_dim;
                let logits: Vec<f64> = (0..=past + t)
                    .map(|j| {
                        let dot: f64 = (0..head_dim)
                            .map(|c| f64::from(query[at + c]) * f64::from(key[cache + j * head_dim + c]))
                            .sum();
                        dot * f64::from(scale)
                    })
                    .collect();
                let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = logits.iter().map(|l| (l - max).exp()).sum();
                for (j, logit) in logits.iter().enumerate() {
                    let weight = (logit - max).exp() / total;
                    for c in 0..head_dim {
                        output[at + c] += weight * f64::from(value[cache + j * head_dim + c]);
                    }
                }
            }
        }
    }
    output
}

#[derive(Debug, Clone)]
struct Case {
    geometry: Geometry,
    seed: u64,
    /// Magnitude of the queries; large ones make one key win everything.
    magnitude: f32,
    factors: Factors,
}

struct Run {
    output: Vec<f32>,
    expected: Vec<f64>,
}

/// Runs a case; `extra` positions are appended to the capacity of a past that is copied, `None` runs in place.
fn run(case: &Case, level: Level, copied: Option<usize>, threads: usize) -> Run {
    let geometry = case.geometry;
    let Geometry { batch, rows, heads, kv_heads, head_dim, past, capacity } = geometry;
    let query: Vec<f32> =
        noise(case.seed, batch * rows * heads * head_dim).into_iter().map(|x| x * case.magnitude).collect();
    let new_key = noise(case.seed + 1, batch * rows * kv_heads * head_dim);
    let new_value = noise(case.seed + 2, batch * rows * kv_heads * head_dim);
    let past_capacity = past + copied.unwrap_or(0);
    let as_factors = |numbers: Vec<f32>| rounded(&numbers, case.factors == Factors::Bf16).into_owned();
    let past_key = as_factors(noise(case.seed + 3, batch * kv_heads * past_capacity * head_dim));
    let past_value = as_factors(noise(case.seed + 4, batch * kv_heads * past_capacity * head_dim));

    // What the cache must hold in the end; NaN wherever nothing may be read.
    let complete = |past_rows: &[f32], new: &[f32]| {
        let mut cache = vec![f32::NAN; batch * kv_heads * capacity * head_dim];
        for head in 0..batch * kv_heads {
            for row in 0..past + rows {
                let to = (head * capacity + row) * head_dim;
                let from = if row < past {
                    &past_rows[(head * past_capacity + row) * head_dim..]
                } else {
                    let (b, g) = (head / kv_heads, head % kv_heads);
                    &new[((b * rows + row - past) * kv_heads + g) * head_dim..]
                };
                cache[to..to + head_dim].copy_from_slice(&from[..head_dim]);
            }
        }
        cache
    };
    let full_key = complete(&past_key, &as_factors(new_key.clone()));
    let full_value = complete(&past_value, &as_factors(new_value.clone()));
    let scale = 1.0 / (head_dim as f32).sqrt();
    let expected = naive(&geometry, &as_factors(query.clone()), &full_key, &full_value, scale);

    let (mut key, mut value) = if copied.is_some() {
        (vec![f32::NAN; full_key.len()], vec![f32::NAN; full_value.len()])
    } else {
        let erase_new = |cache: &[f32]| {
            let mut cache = cache.to_vec();
            for head in cache.chunks_exact_mut(capacity * head_dim) {
                head[past * head_dim..].fill(f32::NAN);
            }
            cache
        };
        (erase_new(&full_key), erase_new(&full_value))
    };
    let past = if copied.is_some() {
        Past::Copied { key: &past_key, value: &past_value, capacity: past_capacity }
    } else {
        Past::InPlace
    };
    let mut output = vec![f32::NAN; query.len()];
    attend_at(
        level,
        case.factors,
        &geometry,
        &Inputs { query: &query, key: &new_key, value: &new_value, past, scale },
        Outputs { output: &mut output, present_key: &mut key, present_value: &mut value },
        &Threads(threads),
    )
    .unwrap();
    for (found, full) in [(&key, &full_key), (&value, &full_value)] {
        for (found, full) in found.iter().zip(full) {
            assert!(found == full || full.is_nan(), "the cache holds {found}, expected {full}");
        }
    }
    Run { output, expected }
}

fn assert_close(run: &Run, tolerance: f64, what: &str) {
    for (i, (&found, &expected)) in run.output.iter().zip(&run.expected).enumerate() {
        assert!(
            (f64::from(found) - expected).abs() <= tolerance,
            "{what}: element {i} is {found}, expected {expected}"
        );
    }
}

fn geometries() -> impl Strategy<Value = Geometry> {
    let heads = prop_oneof![Just((1, 1)), Just((3, 1)), Just((4, 2)), Just((3, 3)), Just((9, 3)), Just((8, 1))];
    let dims = prop_oneof![Just(16), Just(64), Just(80), Just(128), Just(20), Just(1), Just(33)];
    let lengths = prop_oneof![(1usize..5, 0usize..900), (1usize..40, 0usize..60), (17usize..250, 0usize..230)];
    (1usize..3, heads, dims, lengths, 0usize..5).prop_map(
        |(batch, (heads, kv_heads), head_dim, (rows, past), spare)| Geometry {
            batch,
            rows,
            heads,
            kv_heads,
            head_dim,
            past,
            capacity: past + rows + spare,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_definition_at_every_level(geometry in geometries(), seed in 0u64..1000, large in any::<bool>()) {
        // Weights are exp(logit): an error of the logit becomes a relative error of the weight, so the bound grows
        // with the logits, which reach magnitude * sqrt(d) / 3 here.
        let magnitude = if large { 100.0 } else { 1.0 };
        let tolerance = if large { 2e-4 } else { 2e-6 };
        let case = Case { geometry, seed, magnitude, factors: Factors::F32 };
        for level in Level::available() {
            assert_close(&run(&case, level, None, 2), tolerance, &format!("{level:?} in place"));
            assert_close(&run(&case, level, Some(3), 1), tolerance, &format!("{level:?} copied"));
        }
    }

    #[test]
    fn does_not_depend_on_the_threads(geometry in geometries(), seed in 0u64..1000) {
        for factors in [Factors::F32, Factors::Bf16] {
            let case = Case { geometry, seed, magnitude: 3.0, factors };
            let one = run(&case, Level::detect(), None, 1);
            let three = run(&case, Level::detect(), None, 3);
            prop_assert!(one.output.iter().zip(&three.output).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn multiplies_what_is_rounded_at_every_level(geometry in geometries(), seed in 0u64..1000, large in any::<bool>()) {
        // Values are at most 1. Weights lose at most half a unit in the last of 8 bits, each by itself.
        let magnitude = if large { 100.0 } else { 1.0 };
        let case = Case { geometry, seed, magnitude, factors: Factors::Bf16 };
        for level in Level::available() {
            assert_close(&run(&case, level, None, 2), 2.2e-3, &format!("{level:?} in place"));
            assert_close(&run(&case, level, Some(3), 1), 2.2e-3, &format!("{level:?} copied"));
        }
        // Only what is worth pairing is: elsewhere nothing but the order of additions differs.
        if geometry.rows * geometry.group() < WORTH_PAIRING && !large {
            assert_close(&run(&case, Level::detect(), None, 2), 2e-6, "few rows");
        }
    }
}

#[test]
fn long_rows_with_huge_logits_stay_finite() {
    let geometry = Geometry { batch: 1, rows: 3, heads: 2, kv_heads: 1, head_dim: 64, past: 5000, capacity: 5003 };
    for level in Level::available() {
        for rows in [3, 40] {
            let geometry = Geometry { rows, past: 5003 - rows, ..geometry };
            let run = run(&Case { geometry, seed: 7, magnitude: 1e4, factors: Factors::F32 }, level, None, 2);
            // One key wins; the others' weights are far below what f32 can hold.
            assert_close(&run, 2e-2, &format!("{level:?}"));
        }
    }
}

/// A call with one head, one row per entry of `keys`, and values 1, 2, 3, ...
fn scalar_rows(level: Level, keys: &[f32]) -> Vec<f32> {
    let rows = keys.len();
    let geometry = Geometry { batch: 1, rows, heads: 1, kv_heads: 1, head_dim: 1, past: 0, capacity: rows };
    let value: Vec<f32> = (1..=rows).map(|i| i as f32).collect();
    let (mut output, mut present_key, mut present_value) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]);
    attend_at(
        level,
        Factors::F32,
        &geometry,
        &Inputs { query: &vec![1.0; rows], key: keys, value: &value, past: Past::InPlace, scale: 1.0 },
        Outputs { output: &mut output, present_key: &mut present_key, present_value: &mut present_value },
        &Threads(1),
    )
    .unwrap();
    output
}

#[test]
fn minus_infinity_has_no_weight_and_nan_spreads() {
    for level in Level::available() {
        let infinite = scalar_rows(level, &[f32::NEG_INFINITY, 0.0, 0.0]);
        assert!(infinite[0].is_nan(), "{level:?}: a row that sees only minus infinity has no weights");
        assert_eq!(infinite[1..], [2.0, 2.5], "{level:?}");
        let mut keys = vec![0.0; 40];
        keys[30] = f32::NAN;
        let nan = scalar_rows(level, &keys);
        assert!(nan[..30].iter().all(|x| x.is_finite()), "{level:?}");
        assert!(nan[30..].iter().all(|x| x.is_nan()), "{level:?}");
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let good = Geometry { batch: 1, rows: 2, heads: 2, kv_heads: 1, head_dim: 4, past: 1, capacity: 3 };
    let attempt = |geometry: Geometry, query_len: usize| {
        let (mut output, mut key, mut value) = (vec![0.0; 16], vec![0.0; 12], vec![0.0; 12]);
        attend(
            &geometry,
            &Inputs { query: &vec![0.0; query_len], key: &[0.0; 8], value: &[0.0; 8], past: Past::InPlace, scale: 1.0 },
            Outputs { output: &mut output, present_key: &mut key, present_value: &mut value },
            &Threads(1),
        )
        .map_err(|error| error.to_string())
    };
    assert_eq!(attempt(good, 16), Ok(()));
    assert_eq!(attempt(good, 15), Err("query has 15 elements, expected 16".into()));
    let refused = |geometry| attempt(geometry, 16).unwrap_err();
    assert!(refused(Geometry { past: 2, ..good }).contains("room for 3 positions"));
    assert!(refused(Geometry { past: usize::MAX, ..good }).contains("room for 3 positions"));
    assert!(refused(Geometry { heads: 3, kv_heads: 2, ..good }).contains("num_heads is 3"));
    assert!(refused(Geometry { kv_heads: 0, ..good }).contains("kv_num_heads is 0"));
    assert!(refused(Geometry { head_dim: 257, ..good }).contains("257"));
    assert!(refused(Geometry { batch: usize::MAX, ..good }).contains("too large"));
}
