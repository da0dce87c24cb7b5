//! Whether numbers can be trusted, in one sentence, and every reason why not.

use super::schema::Measurement;
use super::stats::{DRIFTS_ABOVE, LatencyStats, UNSTABLE_ABOVE};
use serde::{Deserialize, Serialize};

/// The share of the processors that other programs may keep busy before times are not to be trusted.
pub const BUSY_ABOVE: f64 = 0.05;

/// Fewest runs of a prefix that can be judged: two in each half.
const FEWEST_RUNS: usize = 4;

/// A verdict on a report's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Whether they can be trusted.
    pub trusted: bool,
    /// That, with the reason, in a sentence.
    pub sentence: String,
}

impl Trust {
    /// Of all of `measurements`; `None` if there are none.
    pub fn of<'a>(measurements: impl IntoIterator<Item = &'a Measurement>) -> Option<Self> {
        let all: Vec<&Measurement> = measurements.into_iter().collect();
        let fewest = all.iter().map(|m| m.prefix.runs).min()?;
        let doubtful: usize = all.iter().map(|m| doubts(m).len()).sum();
        let busiest = all.iter().filter_map(|m| m.details.others_busy).max_by(f64::total_cmp);
        let others = busiest.map_or("what other programs did is not known".to_owned(), |busy| {
            format!("other programs took at most {:.0} % of the processors", busy * 100.0)
        });
        let limits = format!("{:.1} % or drifts by more than {:.0} %", UNSTABLE_ABOVE * 100.0, DRIFTS_ABOVE * 100.0);
        let (trusted, sentence) = if doubtful > 0 {
            let reasons = if doubtful == 1 { "1 reason".to_owned() } else { format!("{doubtful} reasons") };
            (
                false,
                format!("These numbers cannot be trusted to the percent, for {reasons} given as warnings; {others}."),
            )
        } else if fewest < FEWEST_RUNS {
            let needed = format!("{fewest} of a prefix where {FEWEST_RUNS} are needed");
            (false, format!("These numbers come from too few runs to be judged ({needed}); {others}."))
        } else {
            (true, format!("These numbers can be trusted: no latency scatters by more than {limits}, and {others}."))
        };
        Some(Self { trusted, sentence })
    }
}

/// Every reason not to trust `measured`, in words.
pub(super) fn doubts(measured: &Measurement) -> Vec<String> {
    let subject = format!("{} at {} context tokens", measured.configuration.method, measured.prompt.context);
    // Where many tokens are decoded, later ones take longer because the cache has grown.
    let grows = measured.per_token.runs as f64 > DRIFTS_ABOVE * measured.tokens_kept as f64;
    let latencies: [(&str, &LatencyStats, bool); 3] = [
        ("prefix", &measured.prefix, true),
        ("first token", &measured.first_token, true),
        ("per token", &measured.per_token, !grows),
    ];
    let mut doubts = Vec::new();
    for (name, stats, should_be_steady) in latencies {
        if stats.is_unstable() {
            doubts.push(format!(
                "{subject}: {name} latency varies by {:.1} % (more than {:.1} %); the machine was not quiet",
                stats.cv * 100.0,
                UNSTABLE_ABOVE * 100.0
            ));
        }
        if let Some(drift) = stats.drift.filter(|drift| should_be_steady && drift.abs() > DRIFTS_ABOVE) {
            doubts.push(format!(
                "{subject}: {name} latency drifts: the later half of the runs is {:.1} % {} than the earlier",
                drift.abs() * 100.0,
                if drift > 0.0 { "slower" } else { "faster" }
            ));
        }
    }
    if let Some(busy) = measured.details.others_busy.filter(|&busy| busy > BUSY_ABOVE) {
        let share = busy * 100.0;
        doubts.push(format!("{subject}: other programs kept {share:.0} % of the processors busy meanwhile"));
    }
    doubts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::profile::schema::tests::measurement;
    use std::time::Duration;

    fn steady() -> Measurement {
        let mut measured = measurement("homer", 8192, &[100; 4]);
        measured.details.others_busy = Some(0.01);
        measured
    }

    fn sentence(measurements: &[Measurement], trusted: bool) -> String {
        let found = Trust::of(measurements).unwrap();
        assert_eq!(found.trusted, trusted, "{found:?}");
        found.sentence
    }

    #[test]
    fn steady_numbers_of_a_quiet_machine_are_trusted() {
        assert_eq!(doubts(&steady()), [] as [&str; 0]);
        assert_eq!(
            sentence(&[steady(), steady()], true),
            "These numbers can be trusted: no latency scatters by more than 2.5 % or drifts by more than 3 %, and other \
             programs took at most 1 % of the processors."
        );
        assert_eq!(Trust::of(&[]), None);
    }

    #[test]
    fn every_reason_against_is_given() {
        // Scatters by less than 2.5 %, and yet became slower.
        let drifting = measurement("homer", 8192, &[100, 100, 104, 104]);
        assert_eq!(
            doubts(&drifting),
            [
                "homer at 8192 context tokens: prefix latency drifts: the later half of the runs is 4.0 % slower than the earlier"
            ]
        );
        let mut busy = steady();
        busy.details.others_busy = Some(0.3);
        assert_eq!(
            doubts(&busy),
            ["homer at 8192 context tokens: other programs kept 30 % of the processors busy meanwhile"]
        );
        let found = sentence(&[steady(), drifting, busy], false);
        assert!(found.contains("for 2 reasons") && found.contains("at most 30 %"), "{found}");
    }

    #[test]
    fn few_runs_are_not_judged() {
        let found = sentence(&[steady(), measurement("plain", 8192, &[100; 3])], false);
        assert!(found.contains("too few runs to be judged (3 of a prefix where 4 are needed)"), "{found}");
    }

    #[test]
    fn tokens_behind_a_cache_that_grows_much_may_become_slower() {
        let times: Vec<Duration> = (0..100).map(|i| Duration::from_micros(100_000 + 60 * i)).collect();
        let mut measured = steady();
        measured.per_token = LatencyStats::new(&times).unwrap();
        measured.per_token.drift = Some(0.04);
        assert_eq!(doubts(&measured), [] as [&str; 0]);
        measured.tokens_kept = 10_000;
        assert_eq!(doubts(&measured).len(), 1);
    }
}
