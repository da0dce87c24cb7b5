//! Cases of `TopKPrune`: inputs whose scores are exact, what the CPU's implementation makes of them, and what a host does.

use super::host::Host;
use super::numbers::{encode, identities, integers, to_floats, to_integers};
use crate::cuda::{Element, TopKPrune};
use accordion_plugins::parallel::Threads;
use accordion_plugins::topk_prune::{Inputs, Lengths, Outputs, PruneError, prune};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

/// What numbers the queries and keys are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// -2 to 2: sums are exact and often equal.
    Integers,
    /// The same, and now and then an infinity or NaN among the keys.
    Wild,
    /// All alike: every score is the same.
    Equal,
}

/// A call to try.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its lengths.
    pub lengths: Lengths,
    /// Element type of queries, keys and the cache.
    pub element: Element,
    /// Element type of hidden states.
    pub hidden_element: Element,
    /// Its numbers.
    pub numbers: Numbers,
    /// Factor of the logits: by a power of two they stay exact, and a negative one makes zeros of both signs.
    pub scale: f32,
    /// Whether the affix lengths are read from memory.
    pub affixes_at: bool,
    /// Whether the logits are wanted.
    pub metric: bool,
    /// What its numbers are drawn from.
    pub seed: u64,
}

/// What a case reads. The CPU's implementation takes numbers; what is only gathered is any bytes.
#[derive(Debug, Clone)]
pub struct Tensors {
    /// `[B, H, d]`.
    pub query_last: Vec<f32>,
    /// `[B, G, L, d]`.
    pub key: Vec<f32>,
    /// One more than three times the length.
    pub bias: Vec<f32>,
    /// `[B, L]`.
    pub position_ids: Vec<i64>,
    /// `[B, L, D]`.
    pub hidden: Vec<u8>,
    /// `[B, n, 2, G, L, d]`.
    pub kv: Vec<u8>,
}

/// What a case writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// `[B, K]`.
    pub keep_idx: Vec<i64>,
    /// `[B, K]`.
    pub kept_position_ids: Vec<i64>,
    /// `[B, L]`, by [`identities`].
    pub scores: Vec<u32>,
    /// `[B, H, L]`, by [`identities`]; empty if not wanted.
    pub metric: Vec<u32>,
    /// `[B, K, D]`.
    pub kept_hidden: Vec<u8>,
    /// `[B, n, 2, G, K, d]`.
    pub kept_kv: Vec<u8>,
}

impl Case {
    /// Bytes of the tensors that are gathered, before and after: the hidden states and the cache.
    fn gathered_bytes(&self) -> [[usize; 2]; 2] {
        let Lengths { batch, kv_heads, head_dim, length, hidden, layers, keep, .. } = self.lengths;
        let hidden = batch * hidden * self.hidden_element.bytes();
        let kv = batch * layers * 2 * kv_heads * head_dim * self.element.bytes();
        [[hidden * length, hidden * keep], [kv * length, kv * keep]]
    }

    /// Its inputs.
    pub fn tensors(&self) -> Tensors {
        let Lengths { batch, heads, kv_heads, head_dim, length, .. } = self.lengths;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut numbers = |count: usize, wild: bool| -> Vec<f32> {
            let mut number = || match self.numbers {
                Numbers::Equal => 1.0,
                Numbers::Wild if wild && random.next_u32().is_multiple_of(64) => {
                    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.next_u32() as usize % 3]
                }
                _ => (random.next_u32() % 5) as f32 - 2.0,
            };
            (0..count).map(|_| number()).collect()
        };
        let query_last = numbers(batch * heads * head_dim, false);
        let key = numbers(batch * kv_heads * length * head_dim, true);
        let [hidden, kv] = self.gathered_bytes().map(|[before, _]| {
            let mut bytes = vec![0; before];
            random.fill_bytes(&mut bytes);
            bytes
        });
        // Gaps, duplicates and an order that is not ascending, as after a merge; the last is the largest.
        let position = |j: usize| if j + 1 == length { 3 * length } else { j * 7 % length + j };
        let position_ids = (0..batch * length).map(|i| position(i % length) as i64).collect();
        let expected = |distance: usize| if self.numbers == Numbers::Equal { 0.5 } else { (distance % 3) as f32 };
        let bias = (0..=3 * length).map(expected).collect();
        Tensors { query_last, key, bias, position_ids, hidden, kv }
    }

    /// What a host makes of them.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn on<H: Host>(&self, host: &H, tensors: &Tensors) -> Result<Pruned, H::Error> {
        let Lengths { batch, heads, kv_heads, head_dim, length, hidden, layers, keep, prefix, suffix } = self.lengths;
        let [[_, hidden_bytes], [_, kv_bytes]] = self.gathered_bytes();
        let query_last = host.upload(&encode(&tensors.query_last, self.element))?;
        let key = host.upload(&encode(&tensors.key, self.element))?;
        let bias = host.upload(&encode(&tensors.bias, Element::F32))?;
        let position_ids = host.upload(&integers(&tensors.position_ids))?;
        let (hidden_states, kv) = (host.upload(&tensors.hidden)?, host.upload(&tensors.kv)?);
        let affixes = [host.upload(&integers(&[prefix as i64]))?, host.upload(&integers(&[suffix as i64]))?];
        let keep_idx = host.upload(&integers(&vec![-1; batch * keep]))?;
        let kept_position_ids = host.upload(&integers(&vec![-1; batch * keep]))?;
        let (kept_hidden, kept_kv) = (host.upload(&vec![0; hidden_bytes])?, host.upload(&vec![0; kv_bytes])?);
        let scores = host.upload(&encode(&vec![7.5; batch * length], Element::F32))?;
        let metric =
            host.upload(&encode(&vec![7.5; if self.metric { batch * heads * length } else { 0 }], Element::F32))?;
        let affix_at = |affix: usize| if self.affixes_at { H::address(&affixes[affix]) } else { 0 };
        // A length that is given by address is not to be taken from here.
        let affix = |length: usize| if self.affixes_at { -1 } else { length as i64 };
        let call = TopKPrune {
            query_last: H::address(&query_last),
            key: H::address(&key),
            bias: H::address(&bias),
            position_ids: H::address(&position_ids),
            hidden: H::address(&hidden_states),
            kv: H::address(&kv),
            prefix_length_at: affix_at(0),
            suffix_length_at: affix_at(1),
            keep_idx: H::address(&keep_idx),
            kept_hidden: H::address(&kept_hidden),
            kept_position_ids: H::address(&kept_position_ids),
            kept_kv: H::address(&kept_kv),
            scores: H::address(&scores),
            metric: H::address(&metric),
            batch: batch as i64,
            heads: heads as i64,
            kv_heads: kv_heads as i64,
            head_dim: head_dim as i64,
            length: length as i64,
            hidden_size: hidden as i64,
            layers: layers as i64,
            keep: keep as i64,
            prefix_length: affix(prefix),
            suffix_length: affix(suffix),
            bias_length: tensors.bias.len() as i64,
            scale: self.scale,
            element: self.element,
            hidden_element: self.hidden_element,
        };
        // SAFETY: every tensor has the elements that the lengths say, and stays until it is read below.
        unsafe { host.topk_prune(&call) }?;
        Ok(Pruned {
            keep_idx: to_integers(&host.download(&keep_idx)?),
            kept_position_ids: to_integers(&host.download(&kept_position_ids)?),
            scores: identities(&to_floats(&host.download(&scores)?)),
            metric: identities(&to_floats(&host.download(&metric)?)),
            kept_hidden: host.download(&kept_hidden)?,
            kept_kv: host.download(&kept_kv)?,
        })
    }

    /// What the CPU's implementation keeps, and the rows that belong to that.
    ///
    /// # Errors
    ///
    /// The lengths do not belong together.
    pub fn expected(&self, tensors: &Tensors) -> Result<Pruned, PruneError> {
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
                scale: self.scale,
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
        )?;
        let rows = |from: &[u8], planes: usize, row: usize| {
            let sequences = keep_idx.chunks_exact(keep.max(1)).enumerate();
            let planes = sequences.flat_map(|(b, kept)| (0..planes).map(move |plane| (b * planes + plane, kept)));
            let mut rows = Vec::new();
            for (plane, kept) in planes {
                for &j in kept {
                    rows.extend_from_slice(&from[(plane * length + j as usize) * row..][..row]);
                }
            }
            rows
        };
        let kept_hidden = rows(&tensors.hidden, 1, hidden * self.hidden_element.bytes());
        let kept_kv = rows(&tensors.kv, layers * 2 * kv_heads, head_dim * self.element.bytes());
        let metric = if self.metric { identities(&metric) } else { Vec::new() };
        Ok(Pruned { keep_idx, kept_position_ids, scores: identities(&scores), metric, kept_hidden, kept_kv })
    }
}

impl Pruned {
    /// The first output in which two results differ, and where.
    pub fn difference(&self, expected: &Pruned) -> Option<String> {
        fn first<T: PartialEq + std::fmt::Debug>(name: &str, found: &[T], expected: &[T]) -> Option<String> {
            let at = found.iter().zip(expected).position(|(found, expected)| found != expected)?;
            Some(format!("{name}[{at}] is {:?}, expected {:?}", found[at], expected[at]))
        }
        let numbers = |bits: &[u32]| bits.iter().map(|&bits| format!("{}", f32::from_bits(bits))).collect::<Vec<_>>();
        first("metric", &numbers(&self.metric), &numbers(&expected.metric))
            .or_else(|| first("scores", &numbers(&self.scores), &numbers(&expected.scores)))
            .or_else(|| first("keep_idx", &self.keep_idx, &expected.keep_idx))
            .or_else(|| first("kept_position_ids", &self.kept_position_ids, &expected.kept_position_ids))
            .or_else(|| first("kept_hidden, byte", &self.kept_hidden, &expected.kept_hidden))
            .or_else(|| first("kept_kv, byte", &self.kept_kv, &expected.kept_kv))
            .or_else(|| (self != expected).then(|| "an output has another number of elements".to_owned()))
    }
}

/// A case of small lengths, to be varied.
pub const SMALL: Case = Case {
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
    scale: 0.5,
    affixes_at: false,
    metric: true,
    seed: 1,
};

/// What a GPU is tried with: a name and a case each.
pub(super) fn cases() -> Vec<(String, Case)> {
    let lengths = |batch, heads, kv_heads, head_dim, length, hidden, layers, keep| Lengths {
        batch,
        heads,
        kv_heads,
        head_dim,
        length,
        hidden,
        layers,
        keep,
        prefix: 0,
        suffix: 0,
    };
    let mut cases = Vec::new();
    for element in Element::ALL {
        let mut add = |name: &str, case: Case| {
            cases.push((format!("{name}, {}", element.name()), Case { element, hidden_element: element, ..case }));
        };
        let of = |lengths: Lengths| Case { lengths, ..SMALL };
        add("small", SMALL);
        add("affixes alone", of(Lengths { keep: 5, ..SMALL.lengths }));
        add("all stay", of(Lengths { keep: 40, ..SMALL.lengths }));
        add("none stays", of(Lengths { keep: 0, prefix: 0, suffix: 0, ..SMALL.lengths }));
        add("one token", of(lengths(1, 1, 1, 64, 1, 8, 1, 1)));
        add("equal scores", Case { numbers: Numbers::Equal, ..of(lengths(2, 4, 4, 64, 3000, 64, 1, 1111)) });
        add("zeros of both signs", Case { scale: -0.5, ..of(lengths(2, 4, 2, 4, 500, 8, 1, 250)) });
        add("NaN and infinities", Case { numbers: Numbers::Wild, ..of(lengths(2, 4, 4, 16, 2000, 64, 1, 1950)) });
        add("affixes on the device", Case { affixes_at: true, metric: false, ..SMALL });
        add("odd lengths", of(lengths(3, 6, 2, 65, 777, 333, 2, 401)));
        add("long rows", of(lengths(1, 2, 1, 300, 64, 20_000, 1, 33)));
        add("64 sequences", of(lengths(64, 8, 2, 64, 129, 32, 1, 70)));
        add("HOMER, SmolLM2", of(Lengths { prefix: 40, suffix: 60, ..lengths(2, 9, 3, 64, 2048, 576, 4, 1100) }));
        add("HOMER, 7B", of(Lengths { prefix: 40, suffix: 60, ..lengths(1, 32, 32, 128, 4096, 4096, 1, 2098) }));
        add("more than TopK takes", of(lengths(1, 4, 1, 32, 65_536, 64, 1, 40_000)));
    }
    cases
}
