#![allow(clippy::unwrap_used)]

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

/// Keys or values of a case.
struct Tensors {
    past: Vec<i8>,
    scale: Vec<f32>,
    new: Vec<f32>,
}

impl Tensors {
    fn new(geometry: &Geometry, past_capacity: usize, seed: u64) -> Self {
        let Geometry { batch, rows, kv_heads, head_dim, .. } = *geometry;
        let past = noise(seed, batch * kv_heads * past_capacity * head_dim);
        // Channels of very different sizes; new numbers reach from half to twice what their channel has room for.
        let scale: Vec<f32> =
            noise(seed + 1, batch * kv_heads * head_dim).iter().map(|x| (x * 4.0).exp2() / 127.0).collect();
        let mut new = noise(seed + 2, batch * rows * kv_heads * head_dim);
        let fill = noise(seed + 3, scale.len());
        for (i, x) in new.iter_mut().enumerate() {
            let channel = i / (rows * kv_heads * head_dim) * kv_heads * head_dim + i % (kv_heads * head_dim);
            *x *= scale[channel] * 127.0 * fill[channel].exp2();
        }
        Self { past: past.iter().map(|x| (x * 127.0) as i8).collect(), scale, new }
    }

    /// What the present cache must hold, number by number from the contract: entries (0 where nothing is said) and scale.
    fn expected(&self, geometry: &Geometry, past_capacity: usize) -> (Vec<i8>, Vec<f32>) {
        let Geometry { batch, rows, kv_heads, head_dim, past, capacity, .. } = *geometry;
        let mut entries = vec![0; batch * kv_heads * capacity * head_dim];
        let mut scales = self.scale.clone();
        for head in 0..batch * kv_heads {
            for c in 0..head_dim {
                let new = |t: usize| {
                    let (b, g) = (head / kv_heads, head % kv_heads);
                    self.new[((b * rows + t) * kv_heads + g) * head_dim + c]
                };
                let before = self.scale[head * head_dim + c];
                let largest = (0..rows).map(|t| new(t).abs()).fold(0.0, f32::max);
                let after =
                    if largest / before < 127.5 { before } else { f32::max(largest * (1.0 / 127.0), before * 1.25) };
                scales[head * head_dim + c] = after;
                for row in 0..past + rows {
                    let entry = if row < past {
                        f32::from(self.past[(head * past_capacity + row) * head_dim + c]) * (before / after)
                    } else {
                        new(row - past) / after
                    };
                    let entry = entry.round_ties_even();
                    assert!(entry.abs() <= 127.0, "{entry}");
                    entries[(head * capacity + row) * head_dim + c] = entry as i8;
                }
            }
        }
        (entries, scales)
    }
}

#[derive(Debug, Clone)]
struct Case {
    geometry: Geometry,
    seed: u64,
}

struct Run {
    output: Vec<f32>,
    expected: Vec<f64>,
}

/// Runs a case; `copied` positions are appended to the capacity of a past that is copied, `None` runs in place.
fn run(case: &Case, level: Level, copied: Option<usize>, threads: usize) -> Run {
    let geometry = case.geometry;
    let Geometry { batch, rows, heads, head_dim, past, capacity, .. } = geometry;
    let past_capacity = copied.map_or(capacity, |room| past + room);
    let query = noise(case.seed, batch * rows * heads * head_dim);
    let tensors = [10, 20].map(|offset| Tensors::new(&geometry, past_capacity, case.seed + offset));
    let expected = tensors.each_ref().map(|part| part.expected(&geometry, past_capacity));
    let mut present = tensors.each_ref().map(|part| {
        let entries = if copied.is_some() { vec![77; expected[0].0.len()] } else { part.past.clone() };
        (entries, vec![f32::NAN; part.scale.len()])
    });
    let mut output = vec![f32::NAN; query.len()];
    let entries = tensors.each_ref().map(|part| Entries {
        past: copied.map(|_| (part.past.as_slice(), past_capacity)),
        scale: &part.scale,
        new: &part.new,
    });
    let places = present.each_mut().map(|(entries, scale)| Present { entries, scale });
    attend_at(level, &geometry, &query, entries, places, &mut output, &Threads(threads)).unwrap();
    for ((entries, scale), (expected, expected_scale)) in present.iter().zip(&expected) {
        assert_eq!(scale, expected_scale);
        for (head, (found, expected)) in
            entries.chunks_exact(capacity * head_dim).zip(expected.chunks_exact(capacity * head_dim)).enumerate()
        {
            let valid = (past + rows) * head_dim;
            assert_eq!(found[..valid], expected[..valid], "head {head}");
        }
    }
    let [key, value] = expected;
    Run { output, expected: naive(&geometry, &query, &key, &value) }
}

/// Attention by its definition, in f64.
fn naive(
    geometry: &Geometry,
    query: &[f32],
    (key, key_scale): &(Vec<i8>, Vec<f32>),
    (value, value_scale): &(Vec<i8>, Vec<f32>),
) -> Vec<f64> {
    let Geometry { batch, rows, heads, kv_heads, head_dim, past, capacity } = *geometry;
    let mut output = vec![0.0; batch * rows * heads * head_dim];
    for at in 0..batch * rows * heads {
        let (b, t, h) = (at / (rows * heads), at / heads % rows, at % heads);
        let head = b * kv_heads + h / (heads / kv_heads);
        let number = |entries: &[i8], scale: &[f32], row: usize, c: usize| {
            f64::from(entries[(head * capacity + row) * head_dim + c]) * f64::from(scale[head * head_dim + c])
        };
        let logits: Vec<f64> = (0..=past + t)
            .map(|j| {
                let product = |c| f64::from(query[at * head_dim + c]) * number(key, key_scale, j, c);
                (0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt()
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
        for c in 0..head_dim {
            let weighed = logits.iter().enumerate().map(|(j, l)| (l - max).exp() * number(value, value_scale, j, c));
            output[at * head_dim + c] = weighed.sum::<f64>() / total;
        }
    }
    output
}

fn geometries() -> impl Strategy<Value = Geometry> {
    let heads = prop_oneof![Just((1, 1)), Just((3, 1)), Just((4, 2)), Just((3, 3)), Just((9, 3)), Just((8, 1))];
    let dims = prop_oneof![Just(16), Just(64), Just(80), Just(8), Just(20), Just(1), Just(33)];
    let lengths = prop_oneof![(1usize..5, 0usize..1300), (1usize..40, 0usize..60)];
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

fn assert_close(run: &Run, what: &str) {
    // Values reach 32 here, and logits 10.
    let scale = run.expected.iter().fold(1.0_f64, |scale, x| scale.max(x.abs()));
    for (i, (&found, &expected)) in run.output.iter().zip(&run.expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= 2e-5 * scale, "{what}: element {i} is {found}, expected {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_definition_at_every_level(geometry in geometries(), seed in 0u64..1000) {
        let case = Case { geometry, seed };
        for level in Level::available() {
            assert_close(&run(&case, level, None, 2), &format!("{level:?} in place"));
            assert_close(&run(&case, level, Some(3), 1), &format!("{level:?} copied"));
        }
    }

    #[test]
    fn does_not_depend_on_the_threads(geometry in geometries(), seed in 0u64..1000) {
        let case = Case { geometry, seed };
        let one = run(&case, Level::detect(), None, 1);
        let three = run(&case, Level::detect(), None, 3);
        prop_assert!(one.output.iter().zip(&three.output).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

/// Appends `new` to one channel of one head that holds `past`, and returns its entries and what they count in.
fn one_channel(past: &[i8], scale: f32, new: &[f32]) -> (Vec<i8>, f32, f32) {
    let (rows, capacity) = (new.len(), past.len() + new.len());
    let geometry = Geometry { batch: 1, rows, heads: 1, kv_heads: 1, head_dim: 1, past: past.len(), capacity };
    let entries = || Entries { past: Some((past, past.len())), scale: std::slice::from_ref(&scale), new };
    let mut present = [0, 1].map(|_| (vec![0; capacity], vec![0.0]));
    let places = present.each_mut().map(|(entries, scale)| Present { entries, scale });
    let mut output = vec![0.0; rows];
    attend(&geometry, &vec![1.0; rows], [entries(), entries()], places, &mut output, &Threads(1)).unwrap();
    let [(entries, scale), _] = present;
    (entries, scale[0], output[rows - 1])
}

#[test]
fn units_grow_where_they_have_to_and_nowhere_else() {
    // The edge rounds down to what is there.
    assert_eq!(one_channel(&[100, -127], 1.0, &[127.4, -127.4, 2.5, 3.5]).0, [100, -127, 127, -127, 2, 4]);
    // Slightly more: by a quarter, so that the next ones fit as well.
    let (entries, scale, _) = one_channel(&[100, -127], 1.0, &[128.0]);
    assert_eq!((entries, scale), (vec![80, -102, 102], 1.25));
    // Much more: to what is needed.
    let (entries, scale, _) = one_channel(&[100, -127], 1.0, &[-12_700.0]);
    assert_eq!((entries, scale), (vec![1, -1, -127], 12_700.0 * (1.0 / 127.0)));
    // A channel that held nothing takes the first row's unit.
    let (entries, scale, _) = one_channel(&[], 2.0_f32.powi(-64), &[0.5, -0.25]);
    assert_eq!((entries, scale), (vec![127, -64], 0.5 * (1.0 / 127.0)));
}

#[test]
fn what_is_no_number_shows() {
    for new in [[f32::NAN, 1.0], [1.0, f32::NAN], [f32::INFINITY, 1.0]] {
        assert!(one_channel(&[1, 2], 1.0, &new).2.is_nan(), "{new:?}");
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let good = Geometry { batch: 1, rows: 2, heads: 2, kv_heads: 1, head_dim: 4, past: 1, capacity: 3 };
    let attempt = |geometry: Geometry, scales: usize| {
        let mut caches = [(); 2].map(|()| ([0_i8; 12], [0.0_f32; 4]));
        let places = caches.each_mut().map(|(entries, scale)| Present { entries, scale });
        let scale = vec![1.0; scales];
        let past = [(); 2].map(|()| Entries { past: None, scale: &scale, new: &[0.0; 8] });
        let tried = attend(&geometry, &[0.0; 16], past, places, &mut [0.0; 16], &Threads(1));
        tried.map_err(|error| error.to_string())
    };
    assert_eq!(attempt(good, 4), Ok(()));
    assert_eq!(attempt(good, 3), Err("scale has 3 elements, expected 4".into()));
    assert!(attempt(Geometry { past: 2, ..good }, 4).unwrap_err().contains("room for 3 positions"));
    assert!(attempt(Geometry { heads: 3, kv_heads: 2, ..good }, 4).unwrap_err().contains("num_heads is 3"));
}
