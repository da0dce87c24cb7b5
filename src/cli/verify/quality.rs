//! `accordion verify BUNDLE --quality BUNDLE...`: what precisions cost and what they bring, in one table.

use super::super::Outcome;
use super::super::compression::own_compression;
use super::super::output::Output;
use super::super::report::write_aside;
use super::super::text::{bytes, grouped, table};
use super::{Arguments, machine};
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::eval::Task;
use accordion::eval::haystack::Haystack;
use accordion::eval::perplexity::{Perplexity, Protocol};
use accordion::eval::quality::report::{QualityReport, QualityRow, SCHEMA};
use accordion::eval::quality::{DECODED, Pace, Side, Speedup, compare};
use accordion::fetch::{Cache, asset};
use accordion::pipeline::prompt::leading_ids;
use anyhow::{Context, ensure};
use clap::Args;
use std::path::{Path, PathBuf};

/// Tokens that are kept whole at either end of a past.
const BUFFER: usize = 100;

#[derive(Debug, Args)]
#[command(next_help_heading = "Quality")]
pub(super) struct QualityArguments {
    /// Hold other bundles of the same model against the bundle instead: what they predict of a text (--text, or the novel
    /// Moby-Dick), the memory they need and the time they take, measured in turns
    #[arg(long, value_name = "BUNDLE", num_args = 1.., conflicts_with_all = ["golden", "bisect", "context", "prefix", "suffix"])]
    quality: Vec<PathBuf>,
    /// Windows of the text
    #[arg(long, value_name = "N", default_value_t = 8, requires = "quality", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    windows: u32,
    /// Tokens of a window: its first half is read, as the method reads, and the second half is predicted
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "quality", value_parser = clap::value_parser!(u32).range(8..=1_000_000))]
    window_len: u32,
    /// Runs of every bundle that are timed
    #[arg(long, value_name = "N", default_value_t = 5, requires = "quality", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

impl QualityArguments {
    /// Whether this is what is asked for.
    pub(super) fn wanted(&self) -> bool {
        !self.quality.is_empty()
    }

    /// Holds the bundles of the flag against the one at `first`.
    pub(super) fn run(&self, first: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
        let paths: Vec<&Path> = std::iter::once(first).chain(self.quality.iter().map(PathBuf::as_path)).collect();
        let bundles = paths.iter().map(|&path| Bundle::open(path)).collect::<Result<Vec<_>, _>>()?;
        for other in &bundles[1..] {
            check_same_model(&bundles[0], other)?;
        }
        let tokenizer = Tokenizer::open(bundles[0].dir(), bundles[0].architecture().vocab_size())?;
        let (name, text) = text(arguments.text.as_deref(), &tokenizer, output)?;
        let past = self.window_len as usize / 2;
        let task = Perplexity {
            text: &text,
            leading: leading_ids(&tokenizer)?,
            protocol: Protocol::Anywhere(vec![past]),
            samples: self.windows as usize,
            segment: self.window_len as usize - past,
            buffer: BUFFER.min(past / 4),
            bucket: self.window_len as usize,
            seed: arguments.seed,
        };
        task.check()?;
        let mut sides = Vec::with_capacity(bundles.len());
        for bundle in &bundles {
            let compression = own_compression(bundle, arguments.width)?;
            for case in task.cases().into_iter().take(1) {
                compression.check(bundle, task.sample(case)?.prompt.lengths())?;
            }
            sides.push(Side::new(arguments.engine.engines(bundle, output)?, compression));
        }
        let bar = output.bar("Comparing precisions", 1);
        let mut on_step = |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        };
        let qualities = compare(&mut sides, &task, self.rounds as usize, &mut on_step)?;
        bar.finish_and_clear();
        let rows = paths.iter().zip(&bundles).zip(qualities).map(|((path, bundle), quality)| QualityRow {
            bundle: path.to_path_buf(),
            method: bundle.manifest().method.name().to_owned(),
            precision: bundle.manifest().numbers(),
            quality,
        });
        let report = QualityReport {
            schema: SCHEMA.to_owned(),
            text: name,
            text_sha256: text.sha256.clone(),
            windows: self.windows,
            window_len: self.window_len,
            predicted: task.segment,
            rounds: self.rounds,
            seed: arguments.seed,
            environment: machine(),
            bundles: rows.collect(),
        };
        if let Some(path) = &arguments.out {
            write_aside(path, &serde_json::to_vec_pretty(&report)?)?;
        }
        output.result(&report, || shown(&report))?;
        Ok(Outcome::Done)
    }
}

/// The text of a file, or the novel that is the default, and where it comes from.
fn text(file: Option<&Path>, tokenizer: &Tokenizer, output: &Output) -> anyhow::Result<(String, Haystack)> {
    let (name, path) = if let Some(file) = file {
        (file.display().to_string(), file.to_path_buf())
    } else {
        let mut bar = None;
        let mut on_progress = |progress| super::super::fetch::show(&mut bar, output, progress);
        let fetched = Cache::from_environment()?.fetch(&asset::MOBY_DICK, &mut on_progress)?;
        (asset::MOBY_DICK.title.to_owned(), fetched.path().to_path_buf())
    };
    let bytes = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let content = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
    Ok((name, Haystack::new(content, tokenizer, "--text")?))
}

/// Bundles are compared if they differ in nothing but the numbers they compute with, and the runtime they are for.
fn check_same_model(first: &Bundle, other: &Bundle) -> anyhow::Result<()> {
    let (expected, found) = (first.manifest(), other.manifest());
    let dir = other.dir().display();
    ensure!(
        found.fingerprint == expected.fingerprint,
        "{dir} is of another model: its fingerprint is {}, expected {}",
        found.fingerprint,
        expected.fingerprint
    );
    ensure!(
        found.method == expected.method && found.architecture == expected.architecture,
        "{dir} is exported otherwise: its method is {} with other settings, expected the same {} as {}",
        found.method.name(),
        expected.method.name(),
        first.dir().display()
    );
    Ok(())
}

fn shown(report: &QualityReport) -> String {
    let rows: Vec<[String; 9]> = report.bundles.iter().map(row).collect();
    let header = [
        "precision",
        ">weights",
        ">resident",
        ">perplexity",
        ">change",
        ">divergence",
        ">same top",
        ">prefill",
        ">decode",
    ];
    let first = report.bundles.first().map_or("the first", |row| row.precision.as_str());
    let mut notes = Vec::new();
    for row in &report.bundles {
        let Some(against) = &row.quality.against else { continue };
        let paces = [("reads", against.prefill_speedup), ("generates", against.decode_speedup)];
        for (does, speedup) in paces.into_iter().filter_map(|(does, speedup)| Some((does, speedup?))) {
            let Speedup { low, high, .. } = speedup;
            let said = match speedup.pace() {
                Pace::Faster => continue,
                Pace::Slower => format!("{} {does} slower than {first} here", row.precision),
                Pace::Unclear => format!("{} {does} no faster than {first} for certain", row.precision),
            };
            notes.push(format!("{said}: {low:.2} to {high:.2} times as fast in {} runs\n", report.rounds));
        }
    }
    format!(
        "{}: {} windows of {} tokens, the second half of each predicted; times of {} runs in turn\n\n{}\n{}\
         divergence: Kullback-Leibler from {first}, nats per token; change: of the perplexity, with the 95 % interval over \
         windows; decode: {DECODED} tokens one at a time\n",
        report.text,
        report.windows,
        grouped(report.window_len.into()),
        report.rounds,
        table(header, &rows),
        notes.concat()
    )
}

fn row(row: &QualityRow) -> [String; 9] {
    let QualityRow { precision, quality, .. } = row;
    let none = || "-".to_owned();
    let percent = |share: f64| format!("{:+.2} %", 100.0 * share);
    let speed = |speedup: Option<Speedup>, seconds: &[f64], unit: &str| match speedup {
        Some(Speedup { median, .. }) => format!("{median:.2}x"),
        None => median(seconds).map_or_else(none, |seconds| format!("{seconds:.3} s{unit}")),
    };
    let against = quality.against.as_ref();
    let change = against.map_or_else(none, |against| {
        let interval = against.loss_increase.and_then(|loss| loss.interval);
        let around = interval.map(|i| format!(" ({} to {})", percent(i.low.exp_m1()), percent(i.high.exp_m1())));
        format!("{}{}", percent(against.perplexity_increase), around.unwrap_or_default())
    });
    [
        precision.clone(),
        bytes(quality.weight_bytes),
        quality.resident_bytes.map_or_else(none, bytes),
        format!("{:.3}", quality.perplexity),
        change,
        against.map_or_else(none, |against| format!("{:.5}", against.divergence)),
        against.map_or_else(none, |against| format!("{:.2} %", 100.0 * against.same_best)),
        speed(against.and_then(|against| against.prefill_speedup), &quality.prefill_seconds, ""),
        speed(against.and_then(|against| against.decode_speedup), &quality.decode_seconds, "/token"),
    ]
}

fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
