//! `TopKPrune`: the kernels against the CPU's implementation and, for what is gathered, against the definition.

use crate::guarded::Guarded;
use crate::library::kernels;
use accordion::cuda::{Element, TopKPrune};
use accordion_plugins::parallel::Threads;
use accordion_plugins::topk_prune::{Inputs, Lengths, Outputs, prune};
use half::{bf16, f16};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

/// What numbers the queries and keys are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Numbers {
    /// -2 to 2: sums are exact and often equal, and there are zeros of both signs.
    Integers,
    /// The same, and now and then an infinity or NaN.
    Wild,
    /// All alike: every score is the same.
    Equal,
}

#[derive(Debug, Clone)]
struct Case {
    lengths: Lengths,
    element: Element,
    hidden_element: Element,
    numbers: Numbers,
    /// Whether the affix lengths are read from memory.
    affixes_at: bool,
    /// Whether the logits are wanted.
    metric: bool,
    /// Whether some distances have no entry in the bias table.
    unknown_distances: bool,
    seed: u64,
}

#[derive(Debug, PartialEq)]
struct Pruned {
    keep_idx: Vec<i64>,
    kept_hidden: Vec<u8>,
    kept_position_ids: Vec<i64>,
    kept_kv: Vec<u8>,
    /// As bits, NaN all alike.
    scores: Vec<u32>,
    metric: Vec<u32>,
}

fn encode(values: &[f32], element: Element) -> Vec<u8> {
    let bytes = |value: &f32| match element {
        Element::F32 => value.to_le_bytes().to_vec(),
        Element::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Element::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// Infinities stay apart from each other; NaN is one, and so are the zeros, of which sums may give either.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { (value + 0.0).to_bits() }).collect()
}

struct Tensors {
    query_last: Vec<f32>,
    key: Vec<f32>,
    bias: Vec<f32>,
    position_ids: Vec<i64>,
    hidden: Vec<u8>,
    kv: Vec<u8>,
}

impl Case {
    fn tensors(&self) -> Tensors {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, .. } = self.lengths;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut numbers = |count: usize, wild: bool| -> Vec<f32> {
            let mut number = || match self.numbers {
                Numbers::Equal => 1.0,
                Numbers::Wild if wild && random.next_u32() % 64 == 0 => {
                    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.next_u32() as usize % 3]
                }
                _ => random.next_u32().rem_euclid(5) as f32 - 2.0,
            };
            (0..count).map(|_| number()).collect()
        };
        let query_last = numbers(batch * heads * head_dim, false);
        let key = numbers(batch * kv_heads * length * head_dim, true);
        let mut bytes = |count: usize| {
            let mut bytes = vec![0; count];
            random.fill_bytes(&mut bytes);
            bytes
        };
        let hidden = bytes(batch * length * hidden * self.hidden_element.bytes());
        let kv = bytes(batch * layers * 2 * kv_heads * length * head_dim * self.element.bytes());
        // Gaps, duplicates and an order that is not ascending, as after a merge; the last is the largest.
        let position = |j: usize| if j + 1 == length { 3 * length } else { j * 7 % length + j };
        let mut position_ids: Vec<i64> = (0..batch * length).map(|i| position(i % length) as i64).collect();
        let bias =
            (0..=3 * length).map(|i| if self.numbers == Numbers::Equal { 0.5 } else { (i % 3) as f32 }).collect();
        if self.unknown_distances {
            for (j, position) in
                position_ids.iter_mut().enumerate().filter(|(j, _)| (j + 1) % length != 0 && j % 5 == 1)
            {
                *position = if j % 2 == 0 { i64::MIN } else { i64::MAX };
            }
        }
        Tensors { query_last, key, bias, position_ids, hidden, kv }
    }

    /// What the kernels make of it.
    fn kernels(&self, tensors: &Tensors) -> Result<Pruned, String> {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, prefix, suffix } = self.lengths;
        let [query_last, key] = [&tensors.query_last, &tensors.key].map(|t| Guarded::of(&encode(t, self.element)));
        let bias = Guarded::of(&tensors.bias);
        let position_ids = Guarded::of(&tensors.position_ids);
        let [hidden_bytes, kv] = [&tensors.hidden, &tensors.kv].map(|t| Guarded::of(t));
        let affixes = [prefix, suffix].map(|length| Guarded::of(&[length as i64]));
        let keep_idx = Guarded::of(&vec![-1_i64; batch * keep]);
        let kept_position_ids = Guarded::of(&vec![-1_i64; batch * keep]);
        let kept_hidden = Guarded::of(&vec![0_u8; batch * keep * hidden * self.hidden_element.bytes()]);
        let kept_kv = Guarded::of(&vec![0_u8; batch * layers * 2 * kv_heads * keep * head_dim * self.element.bytes()]);
        let scores = Guarded::of(&vec![7.5_f32; batch * length]);
        let metric = Guarded::of(&vec![7.5_f32; if self.metric { batch * heads * length } else { 0 }]);
        let call = TopKPrune {
            query_last: query_last.address(),
            key: key.address(),
            bias: bias.address(),
            position_ids: position_ids.address(),
            hidden: hidden_bytes.address(),
            kv: kv.address(),
            prefix_length_at: if self.affixes_at { affixes[0].address() } else { 0 },
            suffix_length_at: if self.affixes_at { affixes[1].address() } else { 0 },
            keep_idx: keep_idx.address(),
            kept_hidden: kept_hidden.address(),
            kept_position_ids: kept_position_ids.address(),
            kept_kv: kept_kv.address(),
            scores: scores.address(),
            metric: metric.address(),
            batch: batch as i64,
            heads: heads as i64,
            kv_heads: kv_heads as i64,
            head_dim: head_dim as i64,
            length: length as i64,
            hidden_size: hidden as i64,
            layers: layers as i64,
            keep: keep as i64,
            prefix_length: if self.affixes_at { -1 } else { prefix as i64 },
            suffix_length: if self.affixes_at { -1 } else { suffix as i64 },
            bias_length: tensors.bias.len() as i64,
            scale: 0.5,
            element: self.element,
            hidden_element: self.hidden_element,
        };
        // SAFETY: every tensor has the elements that the lengths say.
        unsafe { kernels().topk_prune(&call) }?;
        assert!(call.launches().unwrap().len() <= 3);
        Ok(Pruned {
            keep_idx: keep_idx.read(),
            kept_hidden: kept_hidden.read(),
            kept_position_ids: kept_position_ids.read(),
            kept_kv: kept_kv.read(),
            scores: bits(&scores.read()),
            metric: bits(&metric.read()),
        })
    }

    /// What the CPU's implementation keeps, and the rows that belong to that.
    fn expected(&self, tensors: &Tensors) -> Pruned {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, .. } = self.lengths;
        let mut keep_idx = vec![-1; batch * keep];
        let mut kept_position_ids = vec![-1; batch * keep];
        let (mut scores, mut metric) = (vec![0.0; batch * length], vec![0.0; batch * heads * length]);
        prune(
            &Lengths { hidden: 0, layers: 0, ..self.lengths },
            &Inputs {
                query_last: &tensors.query_last,
                key: &tensors.key,
                bias: &tensors.bias,
                position_ids: &tensors.position_ids,
                hidden: &[],
                kv: &[],
                scale: 0.5,
            },
            Outputs {
                keep_idx: &mut keep_idx,
                kept_hidden: &mut [],
                kept_position_ids: &mut kept_position_ids,
                kept_kv: &mut [],
                scores: &mut scores,
                metric: &mut metric,
            },
            &Threads(1),
        )
        .unwrap();
        Pruned {
            kept_hidden: gathered(&tensors.hidden, hidden * self.hidden_element.bytes(), 1, length, keep, &keep_idx),
            kept_kv: gathered(
                &tensors.kv,
                head_dim * self.element.bytes(),
                layers * 2 * kv_heads,
                length,
                keep,
                &keep_idx,
            ),
            keep_idx,
            kept_position_ids,
            scores: bits(&scores),
            metric: if self.metric { bits(&metric) } else { Vec::new() },
        }
    }

    fn check(&self) {
        let tensors = self.tensors();
        assert_eq!(self.kernels(&tensors).unwrap(), self.expected(&tensors));
    }
}

/// Rows `keep_idx` of every plane.
fn gathered(from: &[u8], row: usize, planes: usize, length: usize, keep: usize, keep_idx: &[i64]) -> Vec<u8> {
    let sequences = keep_idx.chunks_exact(keep.max(1)).enumerate();
    let planes = sequences.flat_map(|(b, kept)| (0..planes).map(move |plane| (b * planes + plane, kept)));
    planes
        .flat_map(|(plane, kept)| kept.iter().flat_map(move |&j| &from[(plane * length + j as usize) * row..][..row]))
        .copied()
        .collect()
}

const SMALL: Case = Case {
    lengths: Lengths {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        length: 40,
        hidden: 24,
        layers: 2,
        keep: 20,
        prefix: 3,
        suffix: 2,
    },
    element: Element::F32,
    hidden_element: Element::F32,
    numbers: Numbers::Integers,
    affixes_at: false,
    metric: true,
    unknown_distances: false,
    seed: 1,
};

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
        any::<(bool, bool, u64)>(),
        // Affixes alone, everything, or something in between.
        (0.0..1.0_f64, 0.0..1.0_f64, 0.0..=1.0_f64, 0_usize..4),
    );
    (shape, rest).prop_map(|(shape, rest)| {
        let (batch, kv_heads, group, head_dim, length, hidden, layers) = shape;
        let (element, hidden_element, numbers, (affixes_at, metric, seed), (prefix, suffix, keep, extreme)) = rest;
        let length = if batch == 64 { length.min(100) } else { length };
        let prefix = (prefix * prefix * length as f64) as usize;
        let suffix = (suffix * suffix * (length - prefix) as f64) as usize;
        let between = prefix + suffix + (keep * (length - prefix - suffix) as f64) as usize;
        let keep = [prefix + suffix, length, between, between][extreme];
        let heads = kv_heads * group;
        let lengths = Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, prefix, suffix };
        Case { lengths, element, hidden_element, numbers, affixes_at, metric, seed, ..SMALL }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a C++ compiler"]
    fn kernels_are_the_cpu_implementation(case in any_case()) {
        case.check();
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
                hidden: 2,
                layers: 1,
                keep,
                prefix: 0,
                suffix: 0,
            };
            Case { lengths, numbers, ..SMALL }.check();
        }
    }
}

/// Rows longer than a tile, and rows of which many make one.
#[test]
#[ignore = "needs a C++ compiler"]
fn rows_of_every_length() {
    for element in Element::ALL {
        for (head_dim, hidden) in [(1, 20_000), (3, 16_383), (8, 1), (2048, 8200), (20_001, 3)] {
            let lengths = Lengths { head_dim, hidden, batch: 2, heads: 2, kv_heads: 1, layers: 1, ..SMALL.lengths };
            Case { lengths, element, hidden_element: element, ..SMALL }.check();
        }
    }
}

/// Real scores are no integers; which survive is then decided by the scores that the kernels themselves computed.
#[test]
#[ignore = "needs a C++ compiler"]
fn real_numbers_are_selected_by_their_scores() {
    for seed in 0..20 {
        let case = Case { metric: true, ..SMALL };
        let mut tensors = case.tensors();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        for value in tensors.query_last.iter_mut().chain(&mut tensors.key).chain(&mut tensors.bias) {
            *value = (random.next_u32() as f32 / u32::MAX as f32 - 0.5) * 3.0;
        }
        let (found, expected) = (case.kernels(&tensors).unwrap(), case.expected(&tensors));
        for (found, expected) in found.scores.iter().zip(&expected.scores) {
            let (found, expected) = (f32::from_bits(*found), f32::from_bits(*expected));
            assert!(found == expected || (found - expected).abs() < 1e-5, "{found} {expected}");
        }
        let Lengths { length, keep, .. } = case.lengths;
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
    let case = Case { unknown_distances: true, ..SMALL };
    let pruned = case.kernels(&case.tensors()).unwrap();
    let Lengths { length, prefix, suffix, keep, .. } = case.lengths;
    for (i, bits) in pruned.scores.iter().enumerate() {
        let j = i % length;
        let affix = j < prefix || j >= length - suffix;
        assert_eq!(f32::from_bits(*bits).is_nan(), i % 5 == 1 && !affix, "{i}");
    }
    for (b, kept) in pruned.keep_idx.chunks_exact(keep).enumerate() {
        let unknown = |&&j: &&i64| pruned.scores[b * length + j as usize] == f32::NAN.to_bits();
        assert_eq!(kept.iter().filter(unknown).count(), 0);
    }
}

/// Affix lengths on the device cannot be refused: they are clamped, and the first rows of the affixes stay.
#[test]
#[ignore = "needs a C++ compiler"]
fn affixes_on_the_device_never_lead_out_of_bounds() {
    for (prefix, suffix, kept) in [
        (usize::MAX, 0, (0..20).collect::<Vec<i64>>()),
        (i64::MAX as usize, i64::MAX as usize, (0..20).collect()),
        (0, i64::MAX as usize, (0..20).collect()),
        (15, 10, (0..15).chain(30..35).collect()),
    ] {
        let case = Case { affixes_at: true, lengths: Lengths { prefix, suffix, batch: 1, ..SMALL.lengths }, ..SMALL };
        let pruned = case.kernels(&case.tensors()).unwrap();
        // All ones but the first: a negative length is none.
        if prefix == usize::MAX {
            let none = Case { lengths: Lengths { prefix: 0, ..case.lengths }, ..case };
            assert_eq!(pruned, none.expected(&none.tensors()));
        } else {
            assert_eq!(pruned.keep_idx, kept);
        }
    }
}

/// The Rust side and the C side refuse the same calls.
#[test]
#[ignore = "needs a C++ compiler"]
fn what_is_refused() {
    let fine = TopKPrune {
        query_last: 1 << 20,
        key: 1 << 20,
        bias: 1 << 20,
        position_ids: 1 << 20,
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
    let with = |change: &dyn Fn(&mut TopKPrune)| {
        let mut call = fine;
        change(&mut call);
        call
    };
    // No sequence, so that nothing is launched where nothing is refused.
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
        let call = with(change);
        assert!(call.launches().is_err(), "{i}");
        // SAFETY: it is refused before anything is launched, which is what is asked here.
        assert!(unsafe { kernels().topk_prune(&call) }.is_err(), "{i}");
    }
}
