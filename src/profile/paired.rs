//! Two configurations measured alternately: how much slower or faster one is, and whether that can be said at all.
//!
//! A machine that slows down while it is measured slows down both sides. So the sides take turns in the order ABBA, every
//! turn of A has a turn of B beside it, and only the ratios within these pairs count. Their logarithms are taken to be
//! Student-distributed about the logarithm of the true ratio.

use super::details::Details;
use super::schema::Measurement;
use super::stats::LatencyStats;
use super::student::quantile;
use accordion_graphs::plan::PromptLengths;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Probability with which an interval contains the true ratio. There are three intervals in a comparison: with 95 % each,
/// every seventh comparison of a thing with itself would find a difference.
pub const CONFIDENCE: f64 = 0.99;

/// A difference is claimed only where the whole interval is farther from 1 than this: two processes that do the same
/// differ by about as much, each for as long as it lives, depending on the memory that they were given.
pub const SMALLEST_DIFFERENCE: f64 = 0.01;

/// What can be said of side B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It takes less time than side A.
    Faster,
    /// It takes more time than side A.
    Slower,
    /// These runs show no difference: there is none, or they are too few or too scattered to show it.
    NoDifference,
}

impl Verdict {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::NoDifference => "no difference that these runs can show",
        }
    }
}

/// One quantity of both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// What was measured.
    pub quantity: String,
    /// Median of side A, in milliseconds.
    pub a_ms: f64,
    /// Median of side B, in milliseconds.
    pub b_ms: f64,
    /// Time of B over time of A: geometric mean of the pairs.
    pub ratio: f64,
    /// Lower end of the interval that contains the true ratio with the probability [`CONFIDENCE`].
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// What follows.
    pub verdict: Verdict,
}

impl Difference {
    /// Compares `quantity` by its times in milliseconds, `[A, B]` per pair; `None` for fewer than two pairs and for times
    /// that are not positive.
    pub fn of(quantity: &str, pairs: &[[f64; 2]]) -> Option<Self> {
        let usable = pairs.iter().flatten().all(|&time| time.is_finite() && time > 0.0);
        if pairs.len() < 2 || !usable {
            return None;
        }
        let count = pairs.len() as f64;
        let logs: Vec<f64> = pairs.iter().map(|[a, b]| (b / a).ln()).collect();
        let mean = logs.iter().sum::<f64>() / count;
        let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let margin = quantile(CONFIDENCE, pairs.len() - 1) * (variance / count).sqrt();
        let (ratio, low, high) = (mean.exp(), (mean - margin).exp(), (mean + margin).exp());
        let verdict = if high < 1.0 / (1.0 + SMALLEST_DIFFERENCE) {
            Verdict::Faster
        } else if low > 1.0 + SMALLEST_DIFFERENCE {
            Verdict::Slower
        } else {
            Verdict::NoDifference
        };
        let [a_ms, b_ms] = [0, 1].map(|side| median(pairs.iter().map(|pair| pair[side]).collect()));
        Some(Self { quantity: quantity.to_owned(), a_ms, b_ms, ratio, low, high, verdict })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// Two configurations at one prompt length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What side A is.
    pub a: String,
    /// What side B is.
    pub b: String,
    /// Tokens of the prompt.
    pub prompt: PromptLengths,
    /// Turns of each side.
    pub pairs: usize,
    /// Time to context state, first token, each further token: those that could be compared.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Compares the turns of two sides, `[A, B]` per pair. Each turn's medians count.
    pub fn new(names: [String; 2], prompt: PromptLengths, pairs: &[[Measurement; 2]]) -> Self {
        type Pick = fn(&Measurement) -> &LatencyStats;
        let quantities: [(&str, Pick); 3] = [
            ("time to context state", |m| &m.prefix),
            ("first token", |m| &m.first_token),
            ("each further token", |m| &m.per_token),
        ];
        let differences = quantities.into_iter().filter_map(|(name, pick)| {
            let times: Vec<[f64; 2]> =
                pairs.iter().map(|pair| [0, 1].map(|side| pick(&pair[side]).median_ms)).collect();
            Difference::of(name, &times)
        });
        let [a, b] = names;
        Self { a, b, prompt, pairs: pairs.len(), differences: differences.collect() }
    }
}

/// Which side takes which turn: A, B, B, A and so on, so that what changes steadily falls on both alike.
pub fn turns(pairs: usize) -> impl Iterator<Item = [usize; 2]> {
    (0..pairs).map(|pair| if pair % 2 == 0 { [0, 1] } else { [1, 0] })
}

/// All turns of one side as one measurement: each latency is that of the turns' medians, what other programs did is the
/// mean, loading and first run are those of the turn `cold` before all, and everything else is of the turn whose prefix
/// took the median time. `None` if there is no turn.
pub fn merged(cold: &Measurement, turns: &[Measurement]) -> Option<Measurement> {
    let mut by_prefix: Vec<&Measurement> = turns.iter().collect();
    by_prefix.sort_by(|a, b| a.prefix.median_ms.total_cmp(&b.prefix.median_ms));
    let middle = *by_prefix.get(turns.len().div_ceil(2).checked_sub(1)?)?;
    let over = |pick: fn(&Measurement) -> &LatencyStats| {
        let times = turns.iter().map(|turn| Duration::from_secs_f64(pick(turn).median_ms.max(0.0) / 1e3));
        LatencyStats::new(&times.collect::<Vec<_>>())
    };
    let busy: Vec<f64> = turns.iter().filter_map(|turn| turn.details.others_busy).collect();
    let Details { load_ms, first_run_ms, .. } = cold.details;
    let others_busy = (!busy.is_empty()).then(|| busy.iter().sum::<f64>() / busy.len() as f64);
    Some(Measurement {
        prefix: over(|m| &m.prefix)?,
        first_token: over(|m| &m.first_token)?,
        per_token: over(|m| &m.per_token)?,
        details: Details { load_ms, first_run_ms, others_busy, ..middle.details.clone() },
        ..middle.clone()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::profile::schema::tests::measurement;
    use approx::assert_relative_eq;

    fn verdict(pairs: &[[f64; 2]]) -> Verdict {
        Difference::of("q", pairs).unwrap().verdict
    }

    #[test]
    fn the_interval_is_students() {
        // Log-ratios 0.1, 0.2, 0.3, 0.4: mean 0.25, standard error sqrt(0.05 / 3) / 2, t(0.99, 3) = 5.8409.
        let pairs: Vec<[f64; 2]> = [0.1_f64, 0.2, 0.3, 0.4].map(|log| [10.0, 10.0 * log.exp()]).to_vec();
        let found = Difference::of("q", &pairs).unwrap();
        assert_relative_eq!(found.ratio, 0.25_f64.exp(), max_relative = 1e-9);
        let margin = 5.8409 * (0.05_f64 / 3.0).sqrt() / 2.0;
        assert_relative_eq!(found.low, (0.25 - margin).exp(), max_relative = 1e-4);
        assert_relative_eq!(found.high, (0.25 + margin).exp(), max_relative = 1e-4);
        assert_relative_eq!(found.b_ms, 10.0 * f64::midpoint(0.2_f64.exp(), 0.3_f64.exp()), max_relative = 1e-9);
        assert_eq!((found.a_ms, found.verdict), (10.0, Verdict::NoDifference));
    }

    #[test]
    fn a_steady_difference_is_found_under_a_drift_that_hides_it() {
        // The machine becomes three times slower; B takes 1.05 times what A takes, whenever both run.
        let pairs: Vec<[f64; 2]> = (0..10).map(|i| 100.0 + 20.0 * f64::from(i)).map(|a| [a, 1.05 * a]).collect();
        assert_eq!(verdict(&pairs), Verdict::Slower);
        assert_eq!(verdict(&pairs.iter().map(|&[a, b]| [b, a]).collect::<Vec<_>>()), Verdict::Faster);
    }

    #[test]
    fn an_interval_that_contains_1_is_no_difference() {
        assert_eq!(verdict(&[[10.0, 10.0]; 4]), Verdict::NoDifference);
        // Means differ by 10 %, pairs by more than that.
        assert_eq!(verdict(&[[10.0, 12.0], [10.0, 9.0], [10.0, 13.0], [10.0, 10.5]]), Verdict::NoDifference);
        // Certain, but too small to be the configuration's.
        assert_eq!(verdict(&[[10.0, 10.05]; 8]), Verdict::NoDifference);
        for [low, high] in [[0.9, 1.1], [0.995, 1.5], [0.7, 1.0]] {
            // Two pairs at the ends of a range that contains 1: the interval is wider still.
            assert_eq!(verdict(&[[1.0, low], [1.0, high]]), Verdict::NoDifference);
        }
    }

    #[test]
    fn what_cannot_be_compared_is_left_out() {
        assert_eq!(Difference::of("q", &[[1.0, 2.0]]), None);
        assert_eq!(Difference::of("q", &[[1.0, 2.0], [0.0, 2.0]]), None);
        assert_eq!(Difference::of("q", &[[1.0, 2.0], [1.0, f64::NAN]]), None);
    }

    #[test]
    fn every_side_begins_as_often_and_nobody_has_the_later_turns() {
        let order: Vec<usize> = turns(4).flatten().collect();
        assert_eq!(order, [0, 1, 1, 0, 0, 1, 1, 0]);
        let place =
            |side: usize| order.iter().enumerate().filter(|(_, who)| **who == side).map(|(i, _)| i).sum::<usize>();
        assert_eq!(place(0), place(1));
    }

    #[test]
    fn turns_become_one_comparison_and_two_measurements() {
        let pair = |a: u64, b: u64| [measurement("homer", 64, &[a]), measurement("plain", 64, &[b])];
        let pairs = [pair(100, 200), pair(101, 202), pair(99, 198), pair(100, 201)];
        let names = ["a".to_owned(), "b".to_owned()];
        let comparison = Comparison::new(names, pairs[0][0].prompt, &pairs);
        let found: Vec<_> = comparison.differences.iter().map(|d| (d.quantity.as_str(), d.verdict)).collect();
        let same = Verdict::NoDifference;
        let expected =
            [("time to context state", Verdict::Slower), ("first token", same), ("each further token", same)];
        assert_eq!((comparison.pairs, &found[..]), (4, &expected[..]));
        let mut side: Vec<Measurement> = pairs.iter().map(|pair| pair[1].clone()).collect();
        for (turn, busy) in side.iter_mut().zip([Some(0.1), None, Some(0.3), None]) {
            turn.details.others_busy = busy;
        }
        let mut cold = measurement("plain", 64, &[900]);
        cold.details.first_run_ms = Some(900.0);
        side[0].details.host_ms = Some(1.0);
        let merged = merged(&cold, &side).unwrap();
        assert_relative_eq!(merged.details.others_busy.unwrap(), 0.2, max_relative = 1e-9);
        assert_eq!((merged.details.first_run_ms, merged.details.host_ms), (Some(900.0), Some(1.0)));
        assert_eq!((merged.prefix.runs, merged.configuration.method.as_str()), (4, "plain"));
        assert_relative_eq!(merged.prefix.max_ms, 202.0, max_relative = 1e-9);
    }
}
