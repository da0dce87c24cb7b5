//! Whether a profile is slower, or larger, than an earlier one.

use super::schema::{Configuration, ProfileReport, ProfileRow};
use super::stats::LatencyStats;
use serde::Serialize;

/// One quantity of one row, now and then.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The method.
    pub method: String,
    /// Tokens of the context.
    pub context: usize,
    /// What was measured.
    pub quantity: &'static str,
    /// Its earlier value: milliseconds or bytes.
    pub before: f64,
    /// Its value now.
    pub now: f64,
    /// `now / before - 1`.
    pub growth: f64,
    /// Whether the growth is more than allowed.
    pub regressed: bool,
}

/// Compares the rows of `now` with those of `before` that were measured in the same way: method, decoder, engine, threads,
/// settings and prompt. Medians of times, peak memory and size of the state may grow by the fraction `allowed`.
pub fn compare(before: &ProfileReport, now: &ProfileReport, allowed: f64) -> Vec<Change> {
    let pairs = now.rows.iter().filter_map(|row| Some((before.rows.iter().find(|old| same(old, row))?, row)));
    pairs.flat_map(|(old, row)| changes(old, row, allowed)).collect()
}

fn same(a: &ProfileRow, b: &ProfileRow) -> bool {
    let Configuration { method, decoder, engine, threads, settings } = &a.measured.configuration;
    let other = &b.measured.configuration;
    a.measured.prompt == b.measured.prompt
        && (method, decoder, engine, threads, settings)
            == (&other.method, &other.decoder, &other.engine, &other.threads, &other.settings)
}

fn changes(old: &ProfileRow, new: &ProfileRow, allowed: f64) -> Vec<Change> {
    let median = |stats: &LatencyStats| stats.median_ms;
    let [old_row, new_row] = [old, new].map(|row| &row.measured);
    let quantities = [
        ("time to context state", median(&old_row.prefix), median(&new_row.prefix)),
        ("first token", median(&old_row.first_token), median(&new_row.first_token)),
        ("each further token", median(&old_row.per_token), median(&new_row.per_token)),
        ("peak memory", old_row.peak_resident_bytes as f64, new_row.peak_resident_bytes as f64),
        ("context state", old_row.state_bytes as f64, new_row.state_bytes as f64),
    ];
    let comparable = quantities.into_iter().filter(|(_, before, _)| *before > 0.0);
    comparable
        .map(|(quantity, before, now)| {
            let growth = now / before - 1.0;
            let method = new_row.configuration.method.clone();
            let context = new_row.prompt.context;
            Change { method, context, quantity, before, now, growth, regressed: growth > allowed }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::profile::details::Details;
    use crate::profile::schema::Measurement;
    use accordion_graphs::plan::PromptLengths;
    use std::time::Duration;

    fn report(context: usize, prefix_ms: u64, state_bytes: u64) -> ProfileReport {
        let stats = |ms| LatencyStats::new(&[Duration::from_millis(ms)]).unwrap();
        let measured = Measurement {
            configuration: Configuration {
                method: "homer".into(),
                decoder: String::new(),
                engine: "ort-cpu fp32".into(),
                threads: 1,
                settings: vec![("width".into(), "1".into())],
            },
            prompt: PromptLengths { prefix: 1, context, suffix: 1 },
            tokens_kept: 1,
            prefix: stats(prefix_ms),
            first_token: stats(10),
            per_token: stats(10),
            peak_resident_bytes: 100,
            state_bytes,
            plain_state_bytes: 0,
            operations: None,
            floor_fraction: None,
            operators: Vec::new(),
            details: Details::default(),
        };
        ProfileReport::new(String::new(), Vec::new(), &[measured], Vec::new())
    }

    fn regressed(before: &ProfileReport, now: &ProfileReport) -> Vec<&'static str> {
        compare(before, now, 0.05).into_iter().filter(|change| change.regressed).map(|change| change.quantity).collect()
    }

    #[test]
    fn only_growth_beyond_what_is_allowed_counts() {
        let before = report(8, 100, 1000);
        assert_eq!(regressed(&before, &report(8, 104, 1000)), [] as [&str; 0]);
        assert_eq!(regressed(&before, &report(8, 106, 1000)), ["time to context state"]);
        assert_eq!(regressed(&before, &report(8, 50, 2000)), ["context state"]);
    }

    #[test]
    fn only_rows_measured_in_the_same_way_are_compared() {
        let before = report(8, 100, 1000);
        assert!(compare(&before, &report(9, 900, 1000), 0.05).is_empty());
        let mut wider = report(8, 900, 1000);
        wider.rows[0].measured.configuration.settings[0].1 = "2".into();
        assert!(compare(&before, &wider, 0.05).is_empty());
    }
}
