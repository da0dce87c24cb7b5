//! `accordion fetch`.

use super::output::Output;
use super::text::{bytes, table};
use super::{Outcome, models};
use accordion::fetch::asset::{self, Asset};
use accordion::fetch::{Cache, Progress};
use accordion::models::is_model;
use accordion::synthetic::{NumberType, RandomOptions, Shape, write_random};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde::Serialize;
use std::path::PathBuf;

/// Fetch a pinned, hash-checked model, text or runtime into the cache
///
/// Prints where it is: for a model its checkpoint folder, so that $(accordion fetch smollm2-135m) can be used as an
/// argument; for anything else its files. Without a name, lists what there is.
///
/// With --random, nothing is fetched: a checkpoint of random numbers in the shape of a published model is written, for
/// measurements. Every command takes it as random:NAME (fp32, seed 0) in place of a CHECKPOINT. It has no tokenizer.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// What to fetch
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Write random numbers in this shape instead
    #[arg(long, value_name = "SHAPE", conflicts_with = "names", value_parser = PossibleValuesParser::new(shapes()))]
    random: Option<String>,
    /// The folder to write, which must not exist [default: a folder in the cache]
    #[arg(long, value_name = "DIR", requires = "random")]
    out: Option<PathBuf>,
    /// What decides the random numbers
    #[arg(long, value_name = "N", default_value_t = 0, requires = "random")]
    seed: u64,
    /// Element type of the random numbers
    #[arg(long, value_enum, default_value_t = Type::F32, requires = "random")]
    dtype: Type,
}

fn shapes() -> impl Iterator<Item = &'static str> {
    Shape::all().iter().map(Shape::name)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Type {
    F32,
    Bf16,
}

impl From<Type> for NumberType {
    fn from(dtype: Type) -> Self {
        match dtype {
            Type::F32 => Self::F32,
            Type::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Serialize)]
struct Listing {
    schema: &'static str,
    cache: PathBuf,
    assets: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    title: &'static str,
    licence: &'static str,
    source: Option<String>,
    download_bytes: Option<u64>,
    cached: bool,
}

#[derive(Serialize)]
struct Paths {
    schema: &'static str,
    fetched: Vec<FetchedAsset>,
}

#[derive(Serialize)]
struct FetchedAsset {
    name: &'static str,
    paths: Vec<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    if let Some(shape) = arguments.random.as_deref().and_then(Shape::named) {
        return random(arguments, shape, output);
    }
    let cache = Cache::from_environment()?;
    if arguments.names.is_empty() {
        let listing = list(&cache);
        output.result(&listing, || in_words(&listing))?;
        return Ok(Outcome::Done);
    }
    // A misspelt name is found before anything is downloaded.
    let assets = arguments.names.iter().map(|name| asset::named(name)).collect::<Result<Vec<_>, _>>()?;
    let fetched = assets
        .into_iter()
        .map(|asset| Ok(FetchedAsset { name: asset.name, paths: fetch(asset, &cache, output)? }))
        .collect::<anyhow::Result<Vec<_>>>()?;
    show_paths(fetched, output)
}

fn show_paths(fetched: Vec<FetchedAsset>, output: &Output) -> anyhow::Result<Outcome> {
    let result = Paths { schema: "accordion.fetch/1", fetched };
    output.result(&result, || {
        let paths = result.fetched.iter().flat_map(|asset| &asset.paths);
        paths.map(|path| path.display().to_string()).collect::<Vec<_>>().join("\n")
    })?;
    Ok(Outcome::Done)
}

/// Writes random numbers, into the cache or the folder asked for.
fn random(arguments: &Arguments, shape: &Shape, output: &Output) -> anyhow::Result<Outcome> {
    let options = RandomOptions { seed: arguments.seed, dtype: arguments.dtype.into() };
    let path = match &arguments.out {
        Some(out) => {
            let mut bar: Option<ProgressBar> = None;
            let written = write_random(shape, out, options, |done, total| {
                bar.get_or_insert_with(|| output.bar("random numbers", total)).set_position(done);
            });
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            written?;
            out.clone()
        }
        None => models::random(shape, options, &Cache::from_environment()?, output)?,
    };
    output.remark("random numbers without a tokenizer: for measurements, not for texts");
    show_paths(vec![FetchedAsset { name: shape.name(), paths: vec![path] }], output)
}

fn fetch(asset: &'static Asset, cache: &Cache, output: &Output) -> anyhow::Result<Vec<PathBuf>> {
    if is_model(asset) {
        // By its name even if the working folder has a folder that is called like it.
        return Ok(vec![models::fetch(asset, cache, output)?]);
    }
    let mut bar = None;
    let fetched = cache.fetch(asset, &mut |progress| show(&mut bar, output, progress));
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(fetched?.files().to_vec())
}

fn list(cache: &Cache) -> Listing {
    let row = |asset: &&'static Asset| {
        let package = asset.package().ok();
        Row {
            name: asset.name,
            title: asset.title,
            licence: asset.licence,
            source: package.map(asset::Package::source),
            download_bytes: package.map(|package| package.bytes),
            cached: package.is_some() && cache.get(asset).is_ok_and(|fetched| fetched.is_some()),
        }
    };
    let assets = asset::ALL.iter().map(row).collect();
    Listing { schema: "accordion.assets/1", cache: cache.folder().to_owned(), assets }
}

fn in_words(listing: &Listing) -> String {
    let rows: Vec<[String; 6]> = listing
        .assets
        .iter()
        .map(|asset| {
            [
                asset.name.to_owned(),
                asset.download_bytes.map_or_else(|| "not for this machine".to_owned(), bytes),
                if asset.cached { "yes" } else { "no" }.to_owned(),
                asset.licence.to_owned(),
                asset.source.clone().unwrap_or_default(),
                asset.title.to_owned(),
            ]
        })
        .collect();
    let header = ["NAME", ">DOWNLOAD", "CACHED", "LICENCE", "SOURCE", "WHAT IT IS"];
    format!("{}\nCache: {}\n", table(header, &rows), listing.cache.display())
}

/// Shows the progress of a fetch in `bar`, which is made when it is first needed.
pub(crate) fn show(bar: &mut Option<ProgressBar>, output: &Output, progress: Progress) {
    let bar = bar.get_or_insert_with(|| output.bar(progress.asset, progress.total));
    bar.set_length(progress.total);
    bar.set_position(progress.done);
}
