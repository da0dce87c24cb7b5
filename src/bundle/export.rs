//! Writing a bundle: graphs are built, weights are linked, and the folder appears at once or not at all.

use super::manifest::{GraphEntry, Manifest, Method, WeightFile, sha256};
use super::{BundleError, MANIFEST_FILE};
use crate::checkpoint::Checkpoint;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::methods::{self, Source};
use accordion_graphs::onnx::Scope;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::{PlanError, PromptLengths};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Files of a checkpoint that a bundle takes along where they are there.
const SIDE_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// How weight files get into a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightStorage {
    /// As hard links to the checkpoint's files, or copies where the file system cannot link.
    #[default]
    Link,
    /// As copies.
    Copy,
}

/// The method to export, with what decides its graphs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MethodSettings {
    /// The baseline.
    Plain,
    /// Hierarchical context merging.
    Homer {
        /// Chunk lengths, target and warm-up.
        settings: HomerSettings,
        /// Tree heights to build graphs for, as [`tree_heights`] gives them.
        tree_heights: Vec<usize>,
    },
}

/// What to export and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The method.
    pub method: MethodSettings,
    /// What runtime the graphs are for.
    pub target: Target,
    /// How the weights are stored.
    pub weights: WeightStorage,
    /// Replace a bundle that is already there.
    pub force: bool,
}

/// Exports `checkpoint` as a bundle in the folder `out`.
///
/// # Errors
///
/// The settings do not fit the model, or something cannot be written; then nothing is left behind.
pub fn export(checkpoint: &Checkpoint, out: &Path, options: &ExportOptions) -> Result<Manifest, BundleError> {
    if out.exists() && !options.force {
        return Err(BundleError::Exists { path: out.to_owned() });
    }
    let Architecture::Llama(arch) = checkpoint.architecture() else {
        return Err(BundleError::invalid(checkpoint.dir(), "only Llama-family models can be exported"));
    };
    let source = Source { arch: arch.clone(), weights: Rc::new(checkpoint.weights().clone()), target: options.target };
    let locations = locations(checkpoint)?;
    let (method, graphs) = match &options.method {
        MethodSettings::Plain => {
            (Method::Plain, BTreeMap::from([("decoder".to_owned(), methods::plain::decoder(&source))]))
        }
        MethodSettings::Homer { settings, tree_heights } => {
            let graphs = homer_graphs(&source, *settings, tree_heights)?;
            (Method::Homer { settings: *settings, tree_heights: tree_heights.clone() }, graphs)
        }
    };

    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let aside =
        tempfile::Builder::new().prefix(".accordion-export-").tempdir_in(parent).map_err(BundleError::io(parent))?;
    let mut manifest =
        Manifest::new(method, options.target, checkpoint.architecture().clone(), checkpoint.fingerprint());
    for (name, graph) in graphs {
        let model = graph.finish(&locations)?;
        let file = format!("{name}.onnx");
        write(&aside.path().join(&file), &model.bytes)?;
        let entry = GraphEntry { file, sha256: sha256(&model.bytes), signature: model.signature };
        manifest.graphs.insert(name, entry);
    }
    for (from, location) in checkpoint.weights().files().iter().zip(&locations) {
        let to = aside.path().join(location);
        place(from, &to, options.weights)?;
        manifest.weights.push(WeightFile::describe(&to, location.clone())?);
    }
    for file in SIDE_FILES {
        let from = checkpoint.dir().join(file);
        if from.is_file() {
            place(&from, &aside.path().join(file), options.weights)?;
        }
    }
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| BundleError::invalid(out, e.to_string()))?;
    write(&aside.path().join(MANIFEST_FILE), &json)?;
    put_in_place(aside, out)?;
    Ok(manifest)
}

/// Weight file names inside the bundle, by number of the file.
fn locations(checkpoint: &Checkpoint) -> Result<Vec<String>, BundleError> {
    checkpoint
        .weights()
        .files()
        .iter()
        .map(|path| {
            let name = path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
            name.ok_or_else(|| BundleError::invalid(path, "the file name is not valid UTF-8"))
        })
        .collect()
}

/// Every height that a tree over one of `contexts` (tokens) can have, whatever affixes of up to half a chunk take of the
/// room.
///
/// # Errors
///
/// There is no plan for a context.
pub fn tree_heights(num_layers: usize, settings: HomerSettings, contexts: &[usize]) -> Result<Vec<usize>, PlanError> {
    let smallest_chunk = settings.max_initial_chunk_len.unwrap_or(settings.max_chunk_len).min(settings.max_chunk_len);
    let mut heights = BTreeSet::new();
    for &context in contexts {
        let height = |affixes: usize| -> Result<usize, PlanError> {
            let lengths = PromptLengths { prefix: affixes - 1, context, suffix: 1 };
            Ok(HomerPlan::new(num_layers, lengths, settings)?.tree_height)
        };
        heights.extend(height(1)?..=height((smallest_chunk / 2).max(1))?);
    }
    Ok(heights.into_iter().collect())
}

/// The graphs of all stages of all heights; heights that share a layer range share its graph.
fn homer_graphs(
    source: &Source,
    settings: HomerSettings,
    heights: &[usize],
) -> Result<BTreeMap<String, Scope>, BundleError> {
    let mut graphs = BTreeMap::from([
        ("decoder".to_owned(), methods::plain::decoder(source)),
        ("head".to_owned(), methods::plain::output_head(source)),
    ]);
    for &height in heights {
        let stages = HomerPlan::stage_layers(source.arch.num_layers, settings.layers_warmup, height)?;
        for (level, layers) in stages.iter().enumerate() {
            let name = methods::homer::graph_name(level, layers);
            graphs.entry(name).or_insert_with(|| match level {
                0 => methods::homer::leaf(source, layers),
                _ => methods::homer::merge(source, layers),
            });
        }
    }
    Ok(graphs)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    fs::write(path, bytes).map_err(BundleError::io(path))
}

/// A hard link if it may be one and can be, else a copy that keeps the modification time.
fn place(from: &Path, to: &Path, storage: WeightStorage) -> Result<(), BundleError> {
    // A link to a symbolic link would dangle where the bundle lies: link what it points to.
    let from = fs::canonicalize(from).map_err(BundleError::io(from))?;
    if storage == WeightStorage::Link && fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    fs::copy(&from, to).map_err(BundleError::io(to))?;
    Ok(())
}

/// Renames the finished folder to its place; an old bundle there is removed only once the new one is complete.
fn put_in_place(aside: tempfile::TempDir, out: &Path) -> Result<(), BundleError> {
    let mut replaced: Option<PathBuf> = None;
    if out.exists() {
        if !out.join(MANIFEST_FILE).is_file() {
            return Err(BundleError::invalid(out, "not a bundle: --force replaces only bundles"));
        }
        let old = aside.path().with_extension("replaced");
        fs::rename(out, &old).map_err(BundleError::io(out))?;
        replaced = Some(old);
    }
    if let Err(source) = fs::rename(aside.path(), out) {
        if let Some(old) = replaced {
            fs::rename(&old, out).map_err(BundleError::io(out))?;
        }
        return Err(BundleError::Io { path: out.to_owned(), source });
    }
    // The folder is no longer where the guard would remove it.
    let _ = aside.keep();
    if let Some(old) = replaced {
        fs::remove_dir_all(&old).map_err(BundleError::io(&old))?;
    }
    Ok(())
}
