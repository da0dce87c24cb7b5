//! `TopKPrune`: the kernels against the CPU's implementation.

use crate::library::{Emulator, kernels};
use accordion::cuda::{Element, TopKPrune};
use accordion::selftest::prune::{Case, Numbers, SMALL};
use accordion_plugins::topk_prune::Lengths;
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

fn check(case: &Case) {
    let tensors = case.tensors();
    let (found, expected) = (case.on(&Emulator, &tensors).unwrap(), case.expected(&tensors).unwrap());
    assert_eq!(found.difference(&expected), None, "{case:?}");
}

fn any_case() -> impl Strategy<Value = Case> {
    let element = || prop::sample::select(Element::ALL.as_slice());
    let shape = (
        prop_oneof![9 => 1_usize..4, 1 => Just(64_usize)],
        1_usize..4,
        1_usize..6,
        prop_oneof![3 => 1_usize..20, 1 => prop::sample::select(vec![32_usize, 40, 64, 128, 256, 300])],
        prop_oneof![4 => 1_usize..80, 1 => 80_usize..1500],
        0_usize..70,
        0_usize..4,
    );
    let rest = (
        element(),
        element(),
        prop::sample::select(vec![Numbers::Integers, Numbers::Integers, Numbers::Wild, Numbers::Equal]),
        any::<(bool, bool, bool, u64)>(),
        // Affixes alone, everything, or something in between.
        (0.0..1.0_f64, 0.0..1.0_f64, 0.0..=1.0_f64, 0_usize..4),
    );
    (shape, rest).prop_map(|(shape, rest)| {
        let (batch, kv_heads, group, head_dim, length, hidden, layers) = shape;
        let (element, hidden_element, numbers, (affixes_at, metric, negative, seed), (prefix, suffix, keep, extreme)) =
            rest;
        let length = if batch == 64 { length.min(100) } else { length };
        let prefix = (prefix * prefix * length as f64) as usize;
        let suffix = (suffix * suffix * (length - prefix) as f64) as usize;
        let between = prefix + suffix + (keep * (length - prefix - suffix) as f64) as usize;
        let keep = [prefix + suffix, length, between, between][extreme];
        let heads = kv_heads * group;
        let lengths = Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, prefix, suffix };
        let scale = if negative { -0.5 } else { 0.5 };
        Case { lengths, element, hidden_element, numbers, scale, affixes_at, metric, seed }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a C++ compiler"]
    fn kernels_are_the_cpu_implementation(case in any_case()) {
        check(&case);
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn long_sequences_too() {
    for (length, keep) in
        [(65_536, 33_000), (65_536, 5), (65_535, 65_535), (32_769, 4096), (1, 1), (1, 0), (1024, 1023)]
    {
        for numbers in [Numbers::Integers, Numbers::Equal] {
            let lengths = Lengths {
                batch: 1,
                heads: 2,
                kv_heads: 1,
                head_dim: 4,
                length,
                keep,
                prefix: 0,
                suffix: 0,
                ..SMALL.lengths
            };
            check(&Case { lengths, numbers, ..SMALL });
        }
    }
}

/// Zeros of both signs among the scores at the cut: a negative scale makes the negative ones, a bias the others.
#[test]
#[ignore = "needs a C++ compiler"]
fn both_zeros_are_equal() {
    let lengths = Lengths { batch: 16, heads: 1, kv_heads: 1, head_dim: 1, length: 500, keep: 150, ..SMALL.lengths };
    let case = Case { lengths, scale: -0.5, ..SMALL };
    check(&case);
}

/// Rows longer than a tile, and rows of which many make one.
#[test]
#[ignore = "needs a C++ compiler"]
fn rows_of_every_length() {
    for element in Element::ALL {
        for (head_dim, hidden) in [(1, 20_000), (3, 16_383), (8, 1), (2048, 8200), (20_001, 3)] {
            let lengths = Lengths { head_dim, hidden, heads: 2, kv_heads: 1, layers: 1, ..SMALL.lengths };
            check(&Case { lengths, element, hidden_element: element, ..SMALL });
        }
    }
}

/// Real scores are no integers; which survive is then decided by the scores that the kernels themselves computed.
#[test]
#[ignore = "needs a C++ compiler"]
fn real_numbers_are_selected_by_their_scores() {
    for seed in 0..20 {
        let mut tensors = SMALL.tensors();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        for value in tensors.query_last.iter_mut().chain(&mut tensors.key).chain(&mut tensors.bias) {
            *value = (random.next_u32() as f32 / u32::MAX as f32 - 0.5) * 3.0;
        }
        let (found, expected) = (SMALL.on(&Emulator, &tensors).unwrap(), SMALL.expected(&tensors).unwrap());
        for (found, expected) in found.scores.iter().zip(&expected.scores) {
            let (found, expected) = (f32::from_bits(*found), f32::from_bits(*expected));
            assert!(found.total_cmp(&expected).is_eq() || (found - expected).abs() < 1e-5, "{found} {expected}");
        }
        let Lengths { length, keep, .. } = SMALL.lengths;
        for (scores, kept) in found.scores.chunks_exact(length).zip(found.keep_idx.chunks_exact(keep)) {
            let scores: Vec<f32> = scores.iter().map(|&bits| f32::from_bits(bits)).collect();
            let mut order: Vec<i64> = (0..length as i64).collect();
            order.sort_by(|&i, &j| scores[j as usize].total_cmp(&scores[i as usize]));
            order.truncate(keep);
            order.sort_unstable();
            assert_eq!(order, kept);
        }
    }
}

/// A distance that the table does not have makes a token NaN: it is the first to go.
#[test]
#[ignore = "needs a C++ compiler"]
fn unknown_distances_score_nan() {
    let Lengths { length, prefix, suffix, keep, .. } = SMALL.lengths;
    let mut tensors = SMALL.tensors();
    for (i, position) in tensors.position_ids.iter_mut().enumerate().filter(|(i, _)| i % 5 == 1) {
        *position = [i64::MIN, i64::MAX, 3 * length as i64 + 1, -1][i % 4];
    }
    let pruned = SMALL.on(&Emulator, &tensors).unwrap();
    for (i, bits) in pruned.scores.iter().enumerate() {
        let j = i % length;
        let affix = j < prefix || j >= length - suffix;
        assert_eq!(f32::from_bits(*bits).is_nan(), i % 5 == 1 && !affix, "{i}");
    }
    for (b, kept) in pruned.keep_idx.chunks_exact(keep).enumerate() {
        let unknown = |&&j: &&i64| f32::from_bits(pruned.scores[b * length + j as usize]).is_nan();
        assert_eq!(kept.iter().filter(unknown).count(), 0);
    }
}

/// Affix lengths on the device cannot be refused: they are clamped, and the first rows of the affixes stay.
#[test]
#[ignore = "needs a C++ compiler"]
fn affixes_on_the_device_never_lead_out_of_bounds() {
    let negative = -1_i64 as usize;
    for (prefix, suffix, kept) in [
        (i64::MAX as usize, i64::MAX as usize, Some((0..20).collect::<Vec<i64>>())),
        (0, i64::MAX as usize, Some((0..20).collect())),
        (15, 10, Some((0..15).chain(30..35).collect())),
        (negative, i64::MIN as usize, None),
    ] {
        let case = Case { affixes_at: true, lengths: Lengths { prefix, suffix, batch: 1, ..SMALL.lengths }, ..SMALL };
        let pruned = case.on(&Emulator, &case.tensors()).unwrap();
        if let Some(kept) = kept {
            assert_eq!(pruned.keep_idx, kept);
        } else {
            let none = Case { lengths: Lengths { prefix: 0, suffix: 0, ..case.lengths }, ..case };
            assert_eq!(pruned.difference(&none.expected(&none.tensors()).unwrap()), None);
        }
    }
}

/// The Rust side and the C side refuse the same calls.
#[test]
#[ignore = "needs a C++ compiler"]
fn what_is_refused() {
    // No sequence, so that nothing is launched where nothing is refused.
    let fine = TopKPrune {
        batch: 0,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        length: 40,
        hidden_size: 24,
        layers: 2,
        keep: 20,
        prefix_length: 3,
        suffix_length: 2,
        bias_length: 100,
        ..TopKPrune::default()
    };
    assert_eq!(fine.launches().unwrap(), []);
    // SAFETY: nothing is launched.
    unsafe { kernels().topk_prune(&fine) }.unwrap();
    let refused: [&dyn Fn(&mut TopKPrune); 20] = [
        &|c| c.batch = -1,
        &|c| c.heads = 0,
        &|c| c.kv_heads = 0,
        &|c| c.kv_heads = 3,
        &|c| c.head_dim = 0,
        &|c| c.head_dim = 1 << 31,
        &|c| c.length = -1,
        &|c| c.length = i64::MAX,
        &|c| c.hidden_size = -1,
        &|c| c.layers = i64::MIN,
        &|c| c.keep = 41,
        &|c| c.keep = 4,
        &|c| c.keep = -1,
        &|c| c.prefix_length = -1,
        &|c| c.suffix_length = i64::MAX,
        &|c| c.bias_length = -1,
        &|c| (c.batch, c.layers, c.head_dim) = (1 << 30, 1 << 30, 1 << 30),
        &|c| c.batch = 1,
        &|c| (c.batch, c.keep, c.prefix_length, c.suffix_length) = (1, 0, 0, 0),
        &|c| (c.batch, c.length, c.keep) = (1 << 24, 1 << 8, 1 << 8),
    ];
    for (i, change) in refused.into_iter().enumerate() {
        let mut call = fine;
        change(&mut call);
        assert!(call.launches().is_err(), "{i}");
        // SAFETY: nothing is launched.
        let refused = unsafe { kernels().topk_prune(&call) };
        assert!(refused.is_err(), "{i}");
    }
}
