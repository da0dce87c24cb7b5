//! What the calibration of ranges costs, beside reading the same windows without looking; docs/calibration.md explains the
//! numbers.
//!
//! `cargo bench --bench calibration [-- OPTIONS]`
//!
//! - `--windows N`: windows of *Emma* (32)
//! - `--window-len N`: tokens per window (2048)
//! - `--model MODEL`: another checkpoint than SmolLM2-135M
//! - `--taps`: measure all taps too
#![allow(missing_docs, clippy::print_stdout)]

#[allow(dead_code, reason = "each comparison uses its part")]
mod common;

use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::Checkpoint;
use accordion::environment::{peak_resident_bytes, reset_peak_resident};
use accordion::fetch::{Cache, asset};
use accordion::pipeline::compress::Compression;
use accordion::pipeline::decode::Sequence;
use accordion::pipeline::ranges::{Part, RangeSettings, Text, calibrate};
use accordion_calibration::ranges::{Calibrator, RangeTable};
use accordion_calibration::smoothquant;
use anyhow::Context;
use common::{emma, engines, exported, flag, folder_beside, loader, megabytes, model, number, threads, timed};

/// As the calibration reads.
const CALL_ROWS: usize = 512;
const LOGIT_ROWS: usize = 32;

/// Seconds to read `ids`, a window after the other.
fn read(bundle: &Bundle, ids: &[u32], window_len: usize) -> anyhow::Result<f64> {
    let mut engines = engines(bundle)?;
    Sequence::new(&engines, 2)?.forward(&mut engines, &ids[..2], 1)?;
    let (seconds, ()) = timed(|| {
        for window in ids.chunks(window_len) {
            let mut sequence = Sequence::new(&engines, window.len())?;
            for call in window.chunks(CALL_ROWS) {
                sequence.forward(&mut engines, call, call.len().min(LOGIT_ROWS))?;
            }
        }
        Ok(())
    })?;
    Ok(seconds)
}

/// What is made of a table: clipping values by every calibrator, and the search for exponents.
fn use_table(table: &RangeTable, bundle: &Bundle) -> anyhow::Result<()> {
    let percentile = Calibrator::Percentile(99.99);
    for calibrator in [Calibrator::MinMax, Calibrator::Average, percentile, Calibrator::Entropy, Calibrator::Mse] {
        let (seconds, sum) = timed(|| {
            Ok(table.sites().iter().map(|site| f64::from(site.threshold(calibrator) / site.absmax())).sum::<f64>())
        })?;
        let mean = 100.0 * sum / table.sites().len() as f64;
        println!(
            "{calibrator}: clips at {mean:.1} % of the largest magnitude in the mean, {seconds:.3} s for all sites"
        );
    }
    let (seconds, errors) = timed(|| {
        let mut errors = [0.0, 0.0];
        for site in table.sites() {
            let matrices = site.weights().iter().map(|name| Ok(bundle.weights().tensor(name)?.to_f32()));
            let matrices = matrices.collect::<anyhow::Result<Vec<_>>>()?;
            let matrices: Vec<&[f32]> = matrices.iter().map(Vec::as_slice).collect();
            let found = smoothquant::search(site, &matrices, percentile)?;
            errors[0] += found.unsmoothed_error / matrices.len() as f64;
            errors[1] += found.error / matrices.len() as f64;
        }
        Ok(errors.map(|error| error / table.sites().len() as f64))
    })?;
    println!(
        "smoothquant: squared error of a layer's output {:.5} instead of {:.5} of its square in the mean, {seconds:.1} s",
        errors[1], errors[0]
    );
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let cache = Cache::from_environment()?;
    let model = model("smollm2-135m", &cache)?;
    let (windows, window_len) = (number("--windows", 32)?, number("--window-len", 2048)?);
    let folder = folder_beside(&model)?;
    let path = folder.path().join("plain");
    exported(&model, &path, &MethodSettings::Plain)?;
    let bundle = Bundle::open(&path)?;
    let ids = emma(&Checkpoint::open(&model)?, &cache, windows * window_len)?;
    println!("{windows} windows of {window_len} tokens, {} threads", threads()?);

    reset_peak_resident()?;
    let alone = read(&bundle, &ids, window_len)?;
    let peak = || peak_resident_bytes().context("this system does not tell the peak memory");
    println!("reading alone: {alone:.1} s, peak {:.0} MB", megabytes(peak()?));

    reset_peak_resident()?;
    let content = std::fs::read_to_string(cache.fetch(&asset::EMMA, &mut |_| {})?.path())?;
    let texts = [Text { name: "Emma".to_owned(), content }];
    let settings = RangeSettings { windows, window_len, seed: 0, part: Part::WHOLE, taps: flag("--taps") };
    let compression = Compression::Plain { allow_overlong: false };
    let (observed, table) =
        timed(|| Ok(calibrate(&bundle, Box::new(loader(&bundle)?), &compression, &texts, settings, &mut |_, _| {})?))?;
    println!(
        "reading and measuring: {observed:.1} s ({:.2} times), peak {:.0} MB",
        observed / alone,
        megabytes(peak()?)
    );
    use_table(&table, &bundle)
}
