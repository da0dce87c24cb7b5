//! The choice of the next token from its logits.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// How tokens are chosen. The restrictions apply in the order temperature, top-k, top-p.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divides the logits before softmax. 0 takes the most likely token always (greedy), whatever the other settings.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens, if set.
    pub top_k: Option<usize>,
    /// Only the smallest set of most likely tokens with at least this probability together (nucleus). 1 keeps all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SamplingSettings {
    /// The most likely token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 };
}

/// Why settings were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{flag} is {found}, expected {expected}")]
pub struct SamplingSettingsError {
    /// Flag of the command that sets it.
    pub flag: &'static str,
    /// What it was.
    pub found: String,
    /// What it may be.
    pub expected: &'static str,
}

/// Why no token could be chosen: the model computed nonsense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LogitsError {
    /// A logit is NaN or positive infinity.
    #[error("the logit of token {token} is {value}")]
    NotANumber {
        /// Token id.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// There is no logit above negative infinity.
    #[error("none of the {count} logits is above negative infinity: no token is possible")]
    NoneAllowed {
        /// Number of logits.
        count: usize,
    },
}

/// Chooses tokens; the same settings and logits give the same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: SamplingSettings,
    rng: ChaCha8Rng,
    /// Kept between calls: a vocabulary is large.
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Probability up to a common factor.
    weight: f64,
}

impl Candidate {
    /// Most likely first, then lowest id. Logits are compared because weights underflow.
    fn by_rank(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.token.cmp(&other.token))
    }
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    ///
    /// A setting is out of range.
    pub fn new(settings: SamplingSettings) -> Result<Self, SamplingSettingsError> {
        let SamplingSettings { temperature, top_k, top_p, seed } = settings;
        let refuse = |flag, found, expected| Err(SamplingSettingsError { flag, found, expected });
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return refuse("--temperature", temperature.to_string(), "a finite number not below 0");
        }
        if top_k == Some(0) {
            return refuse("--top-k", "0".into(), "at least 1");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse("--top-p", top_p.to_string(), "a number above 0 and at most 1");
        }
        Ok(Self { settings, rng: ChaCha8Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// The next token's id, given the logit of every token. Among equal logits the lower id ranks first.
    ///
    /// # Errors
    ///
    /// The logits define no probabilities.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, LogitsError> {
        let best = argmax(logits)?;
        if self.settings.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).map(|(token, &logit)| Candidate { token, logit, weight: 0.0 }));
        if let Some(k) = self.settings.top_k.filter(|&k| k < logits.len()) {
            self.candidates.select_nth_unstable_by(k - 1, Candidate::by_rank);
            self.candidates.truncate(k);
            // The selection leaves an unspecified order; the draw below must not depend on it.
            self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        }
        let (max, temperature) = (f64::from(logits[best]), f64::from(self.settings.temperature));
        for candidate in &mut self.candidates {
            // Relative to the maximum no weight can overflow and one of them is 1.
            candidate.weight = ((f64::from(candidate.logit) - max) / temperature).exp();
        }
        if self.settings.top_p < 1.0 {
            keep_nucleus(&mut self.candidates, self.settings.top_p.into());
        }
        Ok(draw(&self.candidates, unit_interval(&mut self.rng)))
    }
}

/// Index of the largest logit, the lowest one if there are several.
fn argmax(logits: &[f32]) -> Result<usize, LogitsError> {
    let mut best = None;
    let mut max = f32::NEG_INFINITY;
    for (token, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(LogitsError::NotANumber { token, value });
        }
        if value > max {
            (best, max) = (Some(token), value);
        }
    }
    best.ok_or(LogitsError::NoneAllowed { count: logits.len() })
}

/// Reduces `candidates` to the smallest number of them, in order of rank, whose weights sum to at least `p` of the total.
///
/// The nucleus is usually a few dozen tokens of a vocabulary of a hundred thousand, so they are ranked in growing blocks
/// until it is found.
fn keep_nucleus(candidates: &mut Vec<Candidate>, p: f64) {
    let target = p * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    let mut sum = 0.0;
    let mut ranked = 0;
    while ranked < candidates.len() {
        let end = candidates.len().min((4 * ranked).max(64));
        candidates[ranked..].select_nth_unstable_by(end - 1 - ranked, Candidate::by_rank);
        candidates[ranked..end].sort_unstable_by(Candidate::by_rank);
        for i in ranked..end {
            sum += candidates[i].weight;
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        ranked = end;
    }
}

/// The candidate at the fraction `u` of the total weight; never one without weight.
fn draw(candidates: &[Candidate], u: f64) -> u32 {
    let mut rest = u * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    let mut last = 0;
    for candidate in candidates.iter().filter(|candidate| candidate.weight > 0.0) {
        if rest < candidate.weight {
            return candidate.token;
        }
        rest -= candidate.weight;
        last = candidate.token;
    }
    // Only rounding leads here: the weights summed to a little less one by one.
    last
}

/// Uniform in [0, 1), with all 53 bits that a double holds there.
fn unit_interval(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const SAMPLED: SamplingSettings = SamplingSettings { temperature: 1.0, top_k: None, top_p: 1.0, seed: 1 };

    fn sampler(settings: SamplingSettings) -> Sampler {
        Sampler::new(settings).unwrap()
    }

    /// Pearson's statistic of 20000 draws against `expected` (which sums to 1); a token with expectation 0 must not occur.
    fn chi_square(settings: SamplingSettings, logits: &[f32], expected: &[f64]) -> f64 {
        const DRAWS: u32 = 20_000;
        let mut sampler = sampler(settings);
        let mut counts = vec![0_u32; logits.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        let cell = |(&count, &p): (&u32, &f64)| {
            let mean = p * f64::from(DRAWS);
            if p > 0.0 {
                (f64::from(count) - mean).powi(2) / mean
            } else {
                assert_eq!(count, 0, "a token that was ruled out occurred");
                0.0
            }
        };
        counts.iter().zip(expected).map(cell).sum()
    }

    fn logs(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    // 99.9th percentiles of the chi-square distribution; the seed is fixed, so a test either always passes or never.
    const CHI_SQUARE: [f64; 5] = [0.0, 10.83, 13.82, 16.27, 18.47];

    #[test]
    fn draws_follow_the_probabilities() {
        let p = [0.4, 0.05, 0.25, 0.1, 0.2];
        assert!(chi_square(SAMPLED, &logs(&p), &p) < CHI_SQUARE[4]);
    }

    #[test]
    fn temperature_sharpens() {
        let settings = SamplingSettings { temperature: 0.5, ..SAMPLED };
        let p = [0.5, 0.3, 0.2];
        let squares = p.map(|p: f64| p * p / 0.38);
        assert!(chi_square(settings, &logs(&p), &squares) < CHI_SQUARE[2]);
    }

    #[test]
    fn top_k_keeps_the_lower_ids_among_equals() {
        let settings = SamplingSettings { top_k: Some(3), ..SAMPLED };
        let logits = logs(&[0.1, 0.2, 0.4, 0.2, 0.2]);
        assert!(chi_square(settings, &logits, &[0.0, 0.25, 0.5, 0.25, 0.0]) < CHI_SQUARE[2]);
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        let settings = SamplingSettings { top_p: 0.6, ..SAMPLED };
        let p = [0.05, 0.3, 0.4, 0.25];
        assert!(chi_square(settings, &logs(&p), &[0.0, 3.0 / 7.0, 4.0 / 7.0, 0.0]) < CHI_SQUARE[1]);
    }

    #[test]
    fn top_p_refers_to_what_top_k_left() {
        // Of 0.4 and 0.3 the first alone has 0.57.
        let settings = SamplingSettings { top_k: Some(2), top_p: 0.5, ..SAMPLED };
        assert!(chi_square(settings, &logs(&[0.3, 0.4, 0.3]), &[0.0, 1.0, 0.0]).abs() < 1e-9);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut greedy = sampler(SamplingSettings::GREEDY);
        assert_eq!(greedy.sample(&[-1.0, 3.0, 2.0, 3.0]), Ok(1));
        assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -1e30]), Ok(1));
    }

    #[test]
    fn the_draws_of_a_seed_are_pinned() {
        let draws = |seed| {
            let mut sampler = sampler(SamplingSettings { seed, top_k: Some(90), top_p: 0.999, ..SAMPLED });
            (0..8).map(|_| sampler.sample(&[0.0; 100]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), [36, 7, 53, 19, 25, 63, 41, 13]);
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn forbidden_tokens_never_occur() {
        let settings = SamplingSettings { top_k: Some(3), top_p: 0.99, ..SAMPLED };
        let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
        let mut sampler = sampler(settings);
        assert!((0..100).all(|_| sampler.sample(&logits) == Ok(1)));
    }

    #[test]
    fn extreme_temperatures_and_logits_are_harmless() {
        for temperature in [f32::MIN_POSITIVE, 1e-45, f32::MAX] {
            let mut sampler = sampler(SamplingSettings { temperature, ..SAMPLED });
            assert!(sampler.sample(&[f32::MIN, f32::MAX, 0.0]).is_ok());
        }
        let mut cold = sampler(SamplingSettings { temperature: 1e-30, ..SAMPLED });
        assert!((0..50).all(|_| cold.sample(&[1.0, 1.1, 0.9]) == Ok(1)));
    }

    #[test]
    fn nonsense_logits_are_refused() {
        for settings in [SamplingSettings::GREEDY, SAMPLED] {
            let mut sampler = sampler(settings);
            assert!(matches!(sampler.sample(&[0.0, f32::NAN]), Err(LogitsError::NotANumber { token: 1, .. })));
            let infinite = LogitsError::NotANumber { token: 0, value: f32::INFINITY };
            assert_eq!(sampler.sample(&[f32::INFINITY, 0.0]), Err(infinite));
            assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3]), Err(LogitsError::NoneAllowed { count: 3 }));
            assert_eq!(sampler.sample(&[]), Err(LogitsError::NoneAllowed { count: 0 }));
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_by_flag() {
        let refused = |settings| Sampler::new(settings).unwrap_err().flag;
        for temperature in [-0.1, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(SamplingSettings { temperature, ..SAMPLED }), "--temperature");
        }
        assert_eq!(refused(SamplingSettings { top_k: Some(0), ..SAMPLED }), "--top-k");
        for top_p in [0.0, -1.0, 1.01, f32::NAN] {
            assert_eq!(refused(SamplingSettings { top_p, ..SAMPLED }), "--top-p");
        }
    }

    proptest! {
        /// The block-wise nucleus is the one a full sort finds.
        #[test]
        fn nucleus_is_that_of_a_full_sort(logits in prop::collection::vec(-8_i8..8, 1..600), p in 0.01..0.999_f64) {
            let candidate = |(token, &logit): (u32, &i8)| {
                let logit = f32::from(logit) / 2.0;
                Candidate { token, logit, weight: f64::from(logit).exp() }
            };
            let mut found: Vec<Candidate> = (0..).zip(&logits).map(candidate).collect();
            let mut sorted = found.clone();
            sorted.sort_by(Candidate::by_rank);
            let target = p * found.iter().map(|c| c.weight).sum::<f64>();
            let mut sum = 0.0;
            let before = sorted.iter().take_while(|c| { let more = sum < target; sum += c.weight; more }).count();
            sorted.truncate(before);
            keep_nucleus(&mut found, p);
            let tokens = |candidates: &[Candidate]| candidates.iter().map(|c| c.token).collect::<Vec<_>>();
            prop_assert_eq!(tokens(&found), tokens(&sorted));
        }
    }
}
