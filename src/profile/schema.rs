//! What `accordion profile` reports: one row per method and context length.

use super::ceilings::Ceilings;
use super::details::Details;
use super::paired::Comparison;
use super::roofline::Roofline;
use super::stats::LatencyStats;
use super::trace::OperatorTime;
use super::trust::{Trust, doubts};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerSettings;
use serde::{Deserialize, Serialize};

/// The value of [`ProfileReport::schema`].
pub const SCHEMA: &str = "accordion.profile/1";

/// The method every other one is compared with.
pub const BASELINE: &str = "plain";

/// How a row was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The method.
    pub method: String,
    /// The decoder, in words: only rows of the same decoder are compared with each other.
    #[serde(default)]
    pub decoder: String,
    /// The engine, with its precision: `ort-cpu fp32`.
    pub engine: String,
    /// Threads the engine may use.
    pub threads: usize,
    /// The method's settings: names and values.
    pub settings: Vec<(String, String)>,
}

/// What was measured for one method at one context length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// How.
    pub configuration: Configuration,
    /// Tokens of the prompt.
    pub prompt: PromptLengths,
    /// Tokens in the context state; for `plain` all of the prompt.
    pub tokens_kept: usize,
    /// Time from token ids to context state.
    pub prefix: LatencyStats,
    /// Time from the context state to the first new token.
    pub first_token: LatencyStats,
    /// Time of each further token.
    pub per_token: LatencyStats,
    /// Peak resident memory of the process.
    pub peak_resident_bytes: u64,
    /// Size of the context state.
    pub state_bytes: u64,
    /// Size that the whole prompt's keys and values would have, at the same precision.
    #[serde(default)]
    pub plain_state_bytes: u64,
    /// Arithmetic operations of the prefix, if the plan counts them.
    pub operations: Option<u64>,
    /// The shortest time the prefix can take on this machine, by its measured rates, over the median prefix time: 1 is
    /// the limit.
    pub floor_fraction: Option<f64>,
    /// Where the time of one more, traced run went, the longest first; empty where none was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operators: Vec<OperatorTime>,
    /// Where the time went and what bounds it.
    #[serde(flatten)]
    pub details: Details,
}

impl Measurement {
    /// The same, with how far it is from the limits that `ceilings` set.
    #[must_use]
    pub fn bounded_by(mut self, ceilings: Ceilings) -> Self {
        let details = &mut self.details;
        let limit = |demand: Option<_>, stats: &LatencyStats| Roofline::new(&demand?, &ceilings, stats.median_ms);
        details.prefix_limit = limit(details.prefix_demand, &self.prefix);
        details.token_limit = limit(details.token_demand, &self.per_token);
        details.ceilings = Some(ceilings);
        self.floor_fraction = details.prefix_limit.map(|limit| limit.fraction);
        self
    }
}

/// A measurement and what follows from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileRow {
    /// What was measured.
    #[serde(flatten)]
    pub measured: Measurement,
    /// Bytes of the context state per context token; absent for an empty context.
    pub state_bytes_per_context_token: Option<f64>,
    /// Bytes of the baseline's cache for the same prompt over those of the context state: how much less is stored.
    #[serde(default)]
    pub state_reduction: Option<f64>,
    /// Median prefix time of the baseline over that of this row, at the same prompt on the same engine with the same
    /// threads; absent for the baseline and where it was not measured.
    pub prefix_speedup: Option<f64>,
    /// The same for each further token.
    pub per_token_speedup: Option<f64>,
}

/// All rows of one profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// The checkpoint, by name.
    pub model: String,
    /// Where it ran: names and values.
    pub environment: Vec<(String, String)>,
    /// The rows, by method in the order of their first appearance, then by context length.
    pub rows: Vec<ProfileRow>,
    /// Why a number should not be trusted.
    pub warnings: Vec<String>,
    /// Whether the numbers can be trusted; absent in results of earlier versions.
    #[serde(default)]
    pub trust: Option<Trust>,
    /// Pairs of configurations that were measured alternately.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparisons: Vec<Comparison>,
}

impl ProfileReport {
    /// Derives, orders and checks. `warnings` of the caller come first.
    pub fn new(
        model: String,
        environment: Vec<(String, String)>,
        measurements: &[Measurement],
        mut warnings: Vec<String>,
    ) -> Self {
        let mut methods: Vec<&str> = Vec::new();
        for measurement in measurements {
            if !methods.contains(&measurement.configuration.method.as_str()) {
                methods.push(&measurement.configuration.method);
            }
        }
        let mut order: Vec<&Measurement> = measurements.iter().collect();
        order.sort_by_key(|m| (methods.iter().position(|&name| name == m.configuration.method), m.prompt.context));
        let rows: Vec<ProfileRow> = order.into_iter().map(|measured| derive(measured, measurements)).collect();
        warnings.extend(rows.iter().flat_map(|row| doubts(&row.measured)));
        let trust = Trust::of(measurements);
        Self { schema: SCHEMA.to_owned(), model, environment, rows, warnings, trust, comparisons: Vec::new() }
    }

    /// The same, with what follows from pairs.
    #[must_use]
    pub fn with_comparisons(self, comparisons: Vec<Comparison>) -> Self {
        Self { comparisons, ..self }
    }
}

/// A decoder in words: enough to tell whether two can be compared.
pub fn decoder_in_words(arch: &Architecture) -> String {
    let family = match arch {
        Architecture::Llama(_) => "llama",
        Architecture::GptNeox(_) => "gpt-neox",
        _ => "decoder",
    };
    let heads = format!("{}/{} heads of {}", arch.num_heads(), arch.num_kv_heads(), arch.head_dim());
    format!("{family}, {} layers of {}, {heads}", arch.num_layers(), arch.hidden_size())
}

/// HOMER's settings as names and values, for reports.
pub fn describe(settings: &HomerSettings) -> Vec<(String, String)> {
    let mut listed = vec![("max chunk length", settings.max_chunk_len)];
    listed.extend(settings.max_initial_chunk_len.map(|len| ("max initial chunk length", len)));
    listed.push(("target length", settings.target_len));
    listed.push(("warm-up layers", settings.layers_warmup));
    listed.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect()
}

fn derive(measured: &Measurement, all: &[Measurement]) -> ProfileRow {
    let same_conditions = |other: &&Measurement| {
        other.configuration.method == BASELINE
            && other.configuration.decoder == measured.configuration.decoder
            && other.configuration.engine == measured.configuration.engine
            && other.configuration.threads == measured.configuration.threads
            && other.prompt == measured.prompt
    };
    let baseline = all.iter().find(same_conditions).filter(|_| measured.configuration.method != BASELINE);
    let speedup = |latency: fn(&Measurement) -> &LatencyStats| {
        let (theirs, ours) = (latency(baseline?).median_ms, latency(measured).median_ms);
        (ours > 0.0).then(|| theirs / ours)
    };
    let context = measured.prompt.context;
    ProfileRow {
        state_bytes_per_context_token: (context > 0).then(|| measured.state_bytes as f64 / context as f64),
        state_reduction: (measured.plain_state_bytes > 0 && measured.state_bytes > 0)
            .then(|| measured.plain_state_bytes as f64 / measured.state_bytes as f64),
        prefix_speedup: speedup(|m| &m.prefix),
        per_token_speedup: speedup(|m| &m.per_token),
        measured: measured.clone(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::profile::roofline::{Bound, Demand};
    use std::time::Duration;

    fn stats(ms: &[u64]) -> LatencyStats {
        LatencyStats::new(&ms.iter().map(|&m| Duration::from_millis(m)).collect::<Vec<_>>()).unwrap()
    }

    pub(in crate::profile) fn measurement(method: &str, context: usize, prefix: &[u64]) -> Measurement {
        Measurement {
            configuration: Configuration {
                method: method.into(),
                decoder: "llama, 2 layers of 8".into(),
                engine: "ort-cpu fp32".into(),
                threads: 2,
                settings: Vec::new(),
            },
            prompt: PromptLengths { prefix: 4, context, suffix: 8 },
            tokens_kept: 2048,
            prefix: stats(prefix),
            first_token: stats(&[20]),
            per_token: stats(&[20]),
            peak_resident_bytes: 1 << 30,
            state_bytes: 1 << 20,
            plain_state_bytes: 1 << 22,
            operations: None,
            floor_fraction: None,
            operators: Vec::new(),
            details: Details::default(),
        }
    }

    fn report(measurements: &[Measurement]) -> ProfileReport {
        ProfileReport::new("tiny".into(), Vec::new(), measurements, vec!["mind the gap".into()])
    }

    #[test]
    fn speed_up_is_against_plain_at_the_same_context() {
        let report = report(&[
            measurement("homer", 8192, &[100]),
            measurement("plain", 8192, &[500]),
            measurement("plain", 4096, &[150]),
            measurement("homer", 4096, &[50]),
            measurement("homer", 16384, &[200]),
        ]);
        let rows: Vec<_> = report
            .rows
            .iter()
            .map(|row| (row.measured.configuration.method.as_str(), row.measured.prompt.context, row.prefix_speedup))
            .collect();
        assert_eq!(
            rows,
            [
                ("homer", 4096, Some(3.0)),
                ("homer", 8192, Some(5.0)),
                ("homer", 16384, None),
                ("plain", 4096, None),
                ("plain", 8192, None)
            ]
        );
        assert_eq!(report.rows[1].state_bytes_per_context_token, Some(128.0));
        assert_eq!(report.rows[1].state_reduction, Some(4.0));
        assert_eq!(report.warnings, ["mind the gap"]);
    }

    #[test]
    fn other_engines_and_decoders_are_no_baseline() {
        let mut plain = measurement("plain", 8192, &[500]);
        plain.configuration.engine = "ort-cuda fp16".into();
        assert_eq!(report(&[plain, measurement("homer", 8192, &[100])]).rows[1].prefix_speedup, None);
        let mut plain = measurement("plain", 8192, &[500]);
        plain.configuration.decoder = "llama, 4 layers of 8".into();
        assert_eq!(report(&[plain, measurement("homer", 8192, &[100])]).rows[1].prefix_speedup, None);
    }

    #[test]
    fn scatter_becomes_a_warning() {
        let report = report(&[measurement("homer", 8192, &[100, 100, 150])]);
        assert_eq!(report.warnings.len(), 2);
        assert!(report.warnings[1].starts_with("homer at 8192 context tokens: prefix latency varies by 24.7 %"));
    }

    #[test]
    fn limits_are_of_prefix_and_token() {
        let mut measured = measurement("homer", 8192, &[4000]);
        let read_bytes = 10;
        let demand = |linear_operations| Demand { linear_operations, attention_operations: 0, read_bytes };
        measured.details.prefix_demand = Some(demand(2000));
        measured.details.token_demand = Some(demand(0));
        let ceilings = Ceilings { linear_flops: 1000.0, attention_flops: 1.0, read_bytes: 1000.0 };
        let found = measured.bounded_by(ceilings);
        let limit = |limit: Option<Roofline>| limit.map(|limit| (limit.bound, limit.fraction));
        assert_eq!(limit(found.details.prefix_limit), Some((Bound::Compute, 0.5)));
        assert_eq!(limit(found.details.token_limit), Some((Bound::Memory, 0.5)));
        assert_eq!((found.floor_fraction, found.details.ceilings), (Some(0.5), Some(ceilings)));
        let nothing = measurement("homer", 8192, &[4000]).bounded_by(ceilings);
        assert_eq!((nothing.floor_fraction, nothing.details.token_limit), (None, None));
    }

    #[test]
    fn results_of_earlier_versions_are_read() {
        let mut json = serde_json::to_value(report(&[measurement("plain", 8192, &[512])])).unwrap();
        json.as_object_mut().unwrap().remove("trust");
        let row = json["rows"][0].as_object_mut().unwrap();
        row["prefix"].as_object_mut().unwrap().remove("drift");
        let details = serde_json::to_value(Details::default()).unwrap();
        details.as_object().unwrap().keys().for_each(|field| drop(row.remove(field)));
        assert!(!row.contains_key("host_ms") && !row.contains_key("details"), "{row:?}");
        let read: ProfileReport = serde_json::from_value(json).unwrap();
        assert_eq!((read.trust, &read.rows[0].measured.details), (None, &Details::default()));
    }

    #[test]
    fn json_says_the_schema_and_comes_back() {
        let report = report(&[measurement("plain", 8192, &[512])]);
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.starts_with(r#"{"schema":"accordion.profile/1""#), "{json}");
        assert_eq!(serde_json::from_str::<ProfileReport>(&json).unwrap(), report);
    }
}
