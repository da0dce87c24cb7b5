//! Profiles on the terminal.

use super::super::text::{bytes, grouped, operations as operations_in_words, table};
use accordion::profile::ceilings::Ceilings;
use accordion::profile::decoding::GraphComparison;
use accordion::profile::details::{DecodedSpan, Details, DeviceShare, StageTime};
use accordion::profile::paired::{CONFIDENCE, Comparison, Difference};
use accordion::profile::roofline::Bound;
use accordion::profile::schema::{Measurement, ProfileReport, ProfileRow};
use accordion::profile::trace::OperatorTime;

/// What is printed on the terminal.
pub(super) fn text(profile: &ProfileReport) -> String {
    let mut text = rows(profile);
    for row in &profile.rows {
        text.push_str(&stages(&row.measured));
        text.push_str(&decoded(&row.measured));
        text.push_str(&cuda_graph(&row.measured));
        if !row.measured.operators.is_empty() {
            text.push_str(&operators(&row.measured));
        }
    }
    profile.comparisons.iter().for_each(|comparison| text.push_str(&pairs(comparison)));
    if let Some(trust) = &profile.trust {
        text.extend(["\n", &trust.sentence, "\n"]);
    }
    text
}

/// The table of all rows.
fn rows(profile: &ProfileReport) -> String {
    let header = [
        "method",
        ">context",
        ">kept",
        ">prefix s",
        ">runs",
        ">vs plain",
        ">first ms",
        ">token p50",
        ">p95 ms",
        ">peak",
        ">state/token",
        ">smaller",
        ">of limit",
        ">token's",
    ];
    let none = || "-".to_owned();
    let row = |row: &ProfileRow| {
        let measured = &row.measured;
        [
            measured.configuration.method.clone(),
            grouped(measured.prompt.context as u64),
            grouped(measured.tokens_kept as u64),
            format!("{:.2}", measured.prefix.median_ms / 1e3),
            measured.prefix.runs.to_string(),
            row.prefix_speedup.map_or_else(none, |factor| format!("{factor:.1} x")),
            format!("{:.1}", measured.first_token.median_ms),
            format!("{:.1}", measured.per_token.median_ms),
            format!("{:.1}", measured.per_token.p95_ms),
            bytes(measured.peak_resident_bytes),
            row.state_bytes_per_context_token.map_or_else(none, |size| bytes(size as u64)),
            row.state_reduction.map_or_else(none, |factor| format!("{factor:.1} x")),
            measured.floor_fraction.map_or_else(none, percent),
            measured.details.token_limit.map_or_else(none, |limit| percent(limit.fraction)),
        ]
    };
    table(header, &profile.rows.iter().map(row).collect::<Vec<_>>())
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// The graphs that the median prefix spent its time in, and what bounds prefix and tokens.
fn stages(measured: &Measurement) -> String {
    const SHOWN: usize = 8;
    let Details { stages, host_ms: Some(host), .. } = &measured.details else { return String::new() };
    let (shown, others) = stages.split_at(stages.len().min(SHOWN));
    let mut parts = shown.to_vec();
    if !others.is_empty() {
        parts.push(StageTime {
            graph: format!("{} other graphs", others.len()),
            calls: others.iter().map(|stage| stage.calls).sum(),
            total_ms: others.iter().map(|stage| stage.total_ms).sum(),
            compute_ms: others.iter().map(|stage| stage.compute_ms).sum(),
        });
    }
    let table = match measured.details.prefix_on_device() {
        Some(share) => on_device(&parts, share),
        None => on_host(&parts, *host),
    };
    format!("\n{}:\n{table}", facts(measured)) + &token(measured)
}

/// Graphs whose work the host does, or waits for.
fn on_host(stages: &[StageTime], host_ms: f64) -> String {
    let total = stages.iter().map(|stage| stage.total_ms).sum::<f64>() + host_ms;
    let row = |name: &str, calls: String, ms: f64| {
        [format!("  {name}"), calls, format!("{ms:.1}"), format!("{:.1} %", ms / total * 100.0)]
    };
    let graph = |stage: &StageTime| row(&stage.graph, grouped(stage.calls as u64), stage.total_ms);
    let mut rows: Vec<_> = stages.iter().map(graph).collect();
    rows.push(row("between graphs", String::new(), host_ms));
    table(["  GRAPH", ">CALLS", ">MS", ">SHARE"], &rows)
}

/// Graphs whose work the host puts on a device's stream. The host's times make up the run; the device computes meanwhile.
fn on_device(stages: &[StageTime], share: DeviceShare) -> String {
    let graph = |stage: &StageTime| {
        let busy = |ms: f64| format!("{:.1} %", ms / share.total_ms() * 100.0);
        [
            format!("  {}", stage.graph),
            grouped(stage.calls as u64),
            format!("{:.2}", stage.total_ms),
            stage.compute_ms.map_or_else(String::new, |ms| format!("{ms:.2}")),
            stage.compute_ms.map_or_else(String::new, busy),
        ]
    };
    let rest =
        |name: &str, ms: f64| [format!("  {name}"), String::new(), format!("{ms:.2}"), String::new(), String::new()];
    let mut rows: Vec<_> = stages.iter().map(graph).collect();
    rows.push(rest("waiting for the device", share.wait_ms));
    rows.push(rest("between graphs", share.host_ms));
    table(["  GRAPH", ">CALLS", ">HOST MS", ">DEVICE MS", ">OF THE RUN"], &rows)
}

/// What a token consists of, in a line.
fn token(measured: &Measurement) -> String {
    let Some(share) = measured.details.token_on_device() else { return String::new() };
    let DeviceShare { enqueue_ms, wait_ms, host_ms, compute_ms } = share;
    let (total, busy) = (share.total_ms(), percent(share.busy()));
    format!(
        "  each token {total:.2} ms: {enqueue_ms:.2} putting it on the stream, {wait_ms:.2} waiting, {host_ms:.2} between; \
         the device computes for {compute_ms:.2} ms ({busy})\n"
    )
}

/// Row, first run, loading, limits in a line.
fn facts(measured: &Measurement) -> String {
    let Details { first_run_ms, load_ms, prefix_limit, token_limit, prefix_demand, token_demand, .. } =
        measured.details;
    let mut facts = vec![format!("{}, median run", subject(measured))];
    if let (Some(first), Some(load)) = (first_run_ms, load_ms) {
        facts.push(format!("first run {first:.1} ms, loading graphs {load:.1} ms"));
    }
    facts.extend(measured.details.peak_device_bytes.map(|size| format!("{} of device memory", bytes(size))));
    for (what, limit, demand) in [("prefix", prefix_limit, prefix_demand), ("token", token_limit, token_demand)] {
        if let (Some(limit), Some(demand)) = (limit, demand) {
            let work = match limit.bound {
                Bound::Compute => operations_in_words(demand.linear_operations + demand.attention_operations),
                Bound::Memory => bytes(demand.read_bytes),
            };
            let (bound, floor) = (limit.bound.name(), limit.floor_ms);
            facts.push(format!("{what} bound by {bound} ({work}): {floor:.1} ms at least"));
        }
    }
    facts.join("; ")
}

fn subject(measured: &Measurement) -> String {
    format!("{} at {}", measured.configuration.method, grouped(measured.prompt.context as u64))
}

/// Tokens by the length of the cache.
fn decoded(measured: &Measurement) -> String {
    let row = |span: &DecodedSpan| {
        [
            format!("  {} to {}", grouped(span.from as u64 + 1), grouped(span.to as u64)),
            grouped(span.cache_rows as u64),
            format!("{:.1}", span.per_token.median_ms),
            format!("{:.1}", span.per_token.p95_ms),
        ]
    };
    let rows: Vec<_> = measured.details.decoded.iter().map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\n{}, by tokens:\n{}", subject(measured), table(["  TOKENS", ">CACHE ROWS", ">P50 MS", ">P95 MS"], &rows))
}

/// What came of pairs.
fn pairs(comparison: &Comparison) -> String {
    let Comparison { a, b, pairs, differences, .. } = comparison;
    let context = grouped(comparison.prompt.context as u64);
    format!("\nA: {a}\nB: {b}\n{context} context tokens, {pairs} pairs:\n{}", compared(differences))
}

/// What came of decoding with and without CUDA graphs.
fn cuda_graph(measured: &Measurement) -> String {
    let Some(GraphComparison { pairs, differences }) = &measured.details.cuda_graph else { return String::new() };
    let subject = subject(measured);
    format!(
        "\n{subject}, decoding without a CUDA graph (A) and with one (B), {pairs} pairs:\n{}",
        compared(differences)
    )
}

/// Differences, as a table.
fn compared(differences: &[Difference]) -> String {
    let row = |difference: &Difference| {
        [
            format!("  {}", difference.quantity),
            format!("{:.2}", difference.a_ms),
            format!("{:.2}", difference.b_ms),
            format!("{:.3}", difference.ratio),
            format!("{:.3} to {:.3}", difference.low, difference.high),
            difference.verdict.words().to_owned(),
        ]
    };
    let rows: Vec<_> = differences.iter().map(row).collect();
    let interval = format!("{:.0} % INTERVAL", CONFIDENCE * 100.0);
    let header = ["  QUANTITY", ">A MS", ">B MS", ">B / A", interval.as_str(), "B IS"];
    table(header, &rows)
}

/// Rates in a line.
pub(super) fn rates(rates: &Ceilings) -> String {
    format!(
        "matrix products {:.0} GFLOP/s, causal attention {:.0} GFLOP/s, reading memory {:.1} GB/s",
        rates.linear_flops / 1e9,
        rates.attention_flops / 1e9,
        rates.read_bytes / 1e9
    )
}

/// The operators that a traced run spent most of its time in.
fn operators(measured: &Measurement) -> String {
    const SHOWN: usize = 12;
    let total: f64 = measured.operators.iter().map(|operator| operator.total_ms).sum();
    let row = |time: &OperatorTime| {
        [
            format!("  {}", time.graph),
            time.module.clone(),
            time.operator.clone(),
            grouped(time.calls as u64),
            format!("{:.1}", time.total_ms),
            format!("{:.1} %", time.total_ms / total * 100.0),
        ]
    };
    let rows: Vec<_> = measured.operators.iter().take(SHOWN).map(row).collect();
    let header = ["  GRAPH", "MODULE", "OPERATOR", ">CALLS", ">MS", ">SHARE"];
    let subject = subject(measured);
    format!("\n{subject}, one traced run, {total:.0} ms in nodes:\n{}", table(header, &rows))
}
