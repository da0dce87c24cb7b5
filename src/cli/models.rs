//! Models by name: what a CHECKPOINT argument may be.

use super::output::Output;
use accordion::checkpoint::Checkpoint;
use accordion::fetch::{Asset, Cache};
use accordion::models::{self, ModelError, OnProgress, Progress};
use accordion::synthetic::{RandomOptions, Shape};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};

/// The checkpoint that `model` means: a folder, a GGUF file, or the name of a model, which is then fetched.
pub(crate) fn open(model: &Path, output: &Output) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(folder(model, output)?)?)
}

/// The checkpoint folder that `model` means.
pub(crate) fn folder(model: &Path, output: &Output) -> anyhow::Result<PathBuf> {
    if model.is_dir() {
        // No cache is needed, and there may be no place for one.
        return Ok(model.to_owned());
    }
    let cache = Cache::from_environment()?;
    Ok(with_bars(output, |on_progress| models::resolve(model, &cache, on_progress))?)
}

/// The checkpoint folder of a model that can be fetched.
pub(crate) fn fetch(asset: &'static Asset, cache: &Cache, output: &Output) -> anyhow::Result<PathBuf> {
    Ok(with_bars(output, |on_progress| models::fetch(asset, cache, on_progress))?)
}

/// The checkpoint folder of a model of random numbers in the cache.
pub(crate) fn random(shape: &Shape, options: RandomOptions, cache: &Cache, output: &Output) -> anyhow::Result<PathBuf> {
    Ok(with_bars(output, |on_progress| models::random(shape, options, cache, on_progress))?)
}

/// Calls `work` with progress bars for what it reports.
fn with_bars<T>(
    output: &Output,
    work: impl FnOnce(&mut OnProgress<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    let mut fetching = None;
    let mut writing: Option<ProgressBar> = None;
    let mut write = |what, done, total| writing.get_or_insert_with(|| output.bar(what, total)).set_position(done);
    let done = work(&mut |progress| match progress {
        Progress::Fetch(progress) => super::fetch::show(&mut fetching, output, progress),
        Progress::Import { done, total } => write("importing", done, total),
        Progress::Random { done, total } => write("random numbers", done, total),
    });
    for bar in fetching.iter().chain(&writing) {
        bar.finish_and_clear();
    }
    done
}
