//! What an export costs: wall time, bytes written (links have none) and peak resident memory, for HOMER at 32k with
//! linked weights.
//!
//! `cargo bench --bench export` takes SmolLM2-135M, fetched if need be, and a sharded bf16 checkpoint of 7B parameters that
//! holds nothing but zeros; paths of other checkpoints can be given. Each export is run five times into a new folder; the
//! time is that of opening the checkpoint and writing the bundle, the memory that of all five.

#[path = "../tests/cli/sparse.rs"]
#[allow(dead_code, reason = "each target that shares the file uses its part")]
mod sparse;

use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::Checkpoint;
use accordion::environment::{peak_resident_bytes, reset_peak_resident};
use accordion::fetch::Cache;
use accordion::models;
use accordion::precision::Recipe;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::HomerSettings;
use std::path::{Path, PathBuf};
use std::time::Instant;

const RUNS: usize = 5;
const CONTEXT: usize = 32_768;
const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 2048, max_initial_chunk_len: None, target_len: 2048, layers_warmup: 12 };

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let root = tempfile::tempdir()?;
    let mut checkpoints: Vec<PathBuf> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).map(PathBuf::from).collect();
    if checkpoints.is_empty() {
        let cache = Cache::from_environment()?;
        checkpoints.push(models::resolve(Path::new("smollm2-135m"), &cache, &mut |_| {})?);
        let large = root.path().join("7B, bf16, 3 shards");
        std::fs::create_dir(&large)?;
        sparse::write(&large, &sparse::large_model(), "BF16", 3);
        checkpoints.push(large);
    }
    for folder in checkpoints {
        measure(&folder, root.path())?;
    }
    Ok(())
}

fn measure(folder: &Path, root: &Path) -> Outcome<()> {
    // A folder beside the checkpoint, where links are possible.
    let place = tempfile::tempdir_in(folder.parent().unwrap_or(root))?;
    reset_peak_resident()?;
    let mut seconds = Vec::new();
    let mut written = 0;
    for run in 0..RUNS {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(folder)?;
        let Architecture::Llama(model) = checkpoint.architecture() else { continue };
        let tree_heights = tree_heights(model.num_layers, SETTINGS, CONTEXT)?;
        let options = ExportOptions {
            method: MethodSettings::Homer { settings: SETTINGS, tree_heights, significance: None },
            target: Target::OrtCpu,
            weights: WeightStorage::Link,
            recipe: Recipe::fp32(),
            force: false,
        };
        let exported = export(&checkpoint, &place.path().join(run.to_string()), &options)?;
        seconds.push(start.elapsed().as_secs_f64());
        written = exported.bytes_written;
        if let Some(problem) = exported.link_failure {
            println!("not linked: {problem}");
        }
    }
    seconds.sort_by(f64::total_cmp);
    println!(
        "{}: {:.3} s (median of {RUNS}; slowest {:.3} s), {:.2} MB written, peak {:.0} MB resident",
        folder.file_name().unwrap_or_default().to_string_lossy(),
        seconds.get(RUNS / 2).copied().unwrap_or_default(),
        seconds.last().copied().unwrap_or_default(),
        written as f64 / 1e6,
        peak_resident_bytes().unwrap_or_default() as f64 / 1e6,
    );
    Ok(())
}
