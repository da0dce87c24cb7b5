//! Writing a bundle: graphs are built, weights are linked, and the folder appears at once or not at all.

use super::manifest::{FileEntry, GraphEntry, Manifest, Method, WeightFile, file_sha256, sha256};
use super::{BundleError, MANIFEST_FILE, SIGNIFICANCE_FILE, WeightStorage};
use crate::checkpoint::{ALIASES, Checkpoint, SIDE_FILES};
use crate::precision::{self, Recipe, WEIGHTS_FILE};
use crate::staging::{Kind, Staging};
use accordion_calibration::significance::{SignificanceTable, TableError};
use accordion_graphs::architecture::{Architecture, Compressor, RopeScaling};
use accordion_graphs::blocks::Target;
use accordion_graphs::methods::plain::DECODER_KV_INT8;
use accordion_graphs::methods::step::{DECODER_STEP, decoder_step};
use accordion_graphs::methods::{self, Source};
use accordion_graphs::onnx::Scope;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use accordion_graphs::plan::{PlanError, PromptLengths};
use accordion_graphs::precision::{KvCache, Precision};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Bundles as folders.
const BUNDLE: Kind = Kind { noun: "bundle", marker: MANIFEST_FILE, prefix: ".accordion-export-" };

/// ONNX Runtime's `GroupQueryAttention` takes heads of a multiple of this width.
const ORT_HEAD_DIM_STEP: usize = 8;

/// The method to export, with what decides its graphs.
#[derive(Debug, Clone, PartialEq)]
pub enum MethodSettings {
    /// The baseline.
    Plain,
    /// Hierarchical context merging.
    Homer {
        /// Chunk lengths, target and warm-up.
        settings: HomerSettings,
        /// Tree heights to build graphs for, as [`tree_heights`] gives them.
        tree_heights: Vec<usize>,
        /// File of the significance table that goes into the bundle.
        significance: Option<PathBuf>,
    },
    /// Recurrent context compression.
    Rcc(RccSettings),
    /// Context tree and self-injection.
    SharedLlm(SharedLlmSettings),
}

impl MethodSettings {
    /// The method as the manifest tells it, and its graphs.
    fn graphs(&self, checkpoint: &Checkpoint, source: &Source) -> Result<(Method, methods::Graphs), BundleError> {
        let misfit = |needs: &str| Err(BundleError::invalid(checkpoint.dir(), needs));
        match self {
            Self::Plain => Ok((Method::Plain, methods::plain::graphs(source))),
            Self::Homer { settings, tree_heights, .. } => {
                if !matches!(source.arch, Architecture::Llama(_)) {
                    return misfit("homer is defined for models of the Llama family only");
                }
                let graphs = methods::homer::graphs(source, *settings, tree_heights)?;
                Ok((Method::Homer { settings: *settings, tree_heights: tree_heights.clone() }, graphs))
            }
            Self::Rcc(settings) => {
                let Some(Compressor::Rcc(model)) = checkpoint.compressor() else {
                    return misfit(
                        "rcc needs a checkpoint with an encoder and maps, and this one has none: \
                         `accordion convert rcc` makes an untrained one of a Llama or GPT-NeoX",
                    );
                };
                settings.check()?;
                settings.check_encoder(&model.encoder, source.arch.num_layers())?;
                Ok((Method::Rcc { settings: *settings }, methods::rcc::graphs(source, model, *settings)))
            }
            Self::SharedLlm(settings) => {
                let Some(Compressor::SharedLlm(model)) = checkpoint.compressor() else {
                    return misfit(
                        "sharedllm needs a checkpoint with a lower model and cross attention, and this one has none: \
                         `accordion convert sharedllm` makes one of a Llama",
                    );
                };
                // The released code knows no other scaling, and its cross attention rotates without an attention factor.
                if matches!(source.arch.rope().scaling, RopeScaling::Yarn { .. } | RopeScaling::Llama3 { .. }) {
                    return misfit(
                        "sharedllm takes rotary scaling none, linear or dynamic only: choose with --rope-scaling",
                    );
                }
                let graphs = methods::sharedllm::graphs(source, model, *settings)?;
                Ok((Method::SharedLlm { settings: *settings }, graphs))
            }
        }
    }
}

/// What to export and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The method.
    pub method: MethodSettings,
    /// What runtime the graphs are for.
    pub target: Target,
    /// How the weights are stored, where the precision leaves them as they are.
    pub weights: WeightStorage,
    /// What precision the graphs compute in.
    pub recipe: Recipe,
    /// Replace a bundle that is already there.
    pub force: bool,
}

/// What an export did.
#[derive(Debug, Clone)]
pub struct Exported {
    /// What the bundle holds.
    pub manifest: Manifest,
    /// Bytes written; links have none.
    pub bytes_written: u64,
    /// Why files were copied that should have been linked: the first of them, and what the system said.
    pub link_failure: Option<String>,
}

/// Exports `checkpoint` as a bundle in the folder `out`. The same checkpoint and options give the same bytes.
///
/// # Errors
///
/// The settings do not fit the model, the significance table is not the model's or too short, or something cannot be
/// written; then nothing is left behind.
pub fn export(checkpoint: &Checkpoint, out: &Path, options: &ExportOptions) -> Result<Exported, BundleError> {
    let mut staging = Staging::create(out, BUNDLE, options.force)?;
    let arch = checkpoint.architecture();
    if options.target == Target::OrtCpu && !arch.head_dim().is_multiple_of(ORT_HEAD_DIM_STEP) {
        let problem = format!(
            "head_dim is {}, target ort-cpu needs a multiple of {ORT_HEAD_DIM_STEP}: export with --target portable",
            arch.head_dim()
        );
        return Err(BundleError::invalid(checkpoint.dir(), problem));
    }
    options.recipe.check(options.target)?;
    let source = Source { arch: arch.clone(), weights: Rc::new(checkpoint.weights().clone()), target: options.target };
    let (method, mut graphs) = options.method.graphs(checkpoint, &source)?;
    let mut manifest = Manifest::new(method, options.target, checkpoint);
    manifest.kv_cache = options.recipe.kv_cache;
    graphs.extend(second_decoder(&manifest, &source));
    let locations = if options.recipe.precision == Precision::Fp32 {
        link_weights(checkpoint, options.weights, &mut staging, &mut manifest)?
    } else {
        rewrite_weights(checkpoint, &options.recipe, &graphs, &mut staging, &mut manifest)?
    };
    for (name, graph) in graphs {
        let model = graph.finish(&locations)?;
        let file = format!("{name}.onnx");
        staging.write(&file, &model.bytes)?;
        let entry = GraphEntry { file, sha256: sha256(&model.bytes), signature: model.signature };
        manifest.graphs.insert(name, entry);
    }
    for file in SIDE_FILES {
        let from = checkpoint.dir().join(file);
        if from.is_file() {
            staging.place(&from, file, options.weights)?;
        }
    }
    if let MethodSettings::Homer { settings, significance: Some(table), .. } = &options.method {
        manifest.significance = Some(place_table(&mut staging, table, &manifest, arch.num_layers(), settings)?);
    }
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| BundleError::invalid(out, e.to_string()))?;
    staging.write(MANIFEST_FILE, &json)?;
    let (bytes_written, link_failure) = (staging.bytes_written(), staging.link_failure().map(str::to_owned));
    staging.publish()?;
    Ok(Exported { manifest, bytes_written, link_failure })
}

/// The decoder that a bundle has beside the one that every method ends in, by name: over a cache of 8-bit integers, or, where
/// the graphs' own cache grows, for one token after the other.
pub(crate) fn second_decoder(manifest: &Manifest, source: &Source) -> Option<(String, Scope)> {
    let injected = match (&manifest.method, &manifest.compressor) {
        (Method::SharedLlm { .. }, Some(Compressor::SharedLlm(model))) => model.injected_layers,
        _ => 0,
    };
    match (manifest.kv_cache, manifest.target) {
        (KvCache::Int8, _) => {
            Some((DECODER_KV_INT8.to_owned(), methods::plain::decoder(source, injected, KvCache::Int8)))
        }
        (KvCache::Fp32, Target::Portable) => Some((DECODER_STEP.to_owned(), decoder_step(source, injected))),
        (KvCache::Fp32, Target::OrtCpu) => None,
    }
}

/// Puts the checkpoint's weight files into the bundle. Returns their names there.
fn link_weights(
    checkpoint: &Checkpoint,
    storage: WeightStorage,
    staging: &mut Staging,
    manifest: &mut Manifest,
) -> Result<Vec<String>, BundleError> {
    let locations = locations(checkpoint)?;
    for (from, location) in checkpoint.weights().files().iter().zip(&locations) {
        let sha256 = staging.place(from, location, storage)?;
        let mut described = WeightFile::describe(&staging.path(location), location.clone())?;
        described.sha256 = sha256;
        manifest.weights.push(described);
    }
    if !checkpoint.weights().aliases().is_empty() {
        let sha256 = staging.place(&checkpoint.dir().join(ALIASES), ALIASES, WeightStorage::Copy)?.unwrap_or_default();
        manifest.aliases = Some(FileEntry { file: ALIASES.to_owned(), sha256 });
    }
    Ok(locations)
}

/// Writes the weights in another precision, and has the graphs compute in it. Returns the names of the files in the bundle.
fn rewrite_weights(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    graphs: &methods::Graphs,
    staging: &mut Staging,
    manifest: &mut Manifest,
) -> Result<Vec<String>, BundleError> {
    let applied = precision::apply(recipe, checkpoint, &manifest.required_tensors(), graphs, manifest.target, staging)?;
    manifest.precision = recipe.precision;
    manifest.quantization = Some(applied);
    let path = staging.path(WEIGHTS_FILE);
    let mut described = WeightFile::describe(&path, WEIGHTS_FILE.to_owned())?;
    described.sha256 = Some(file_sha256(&path)?);
    manifest.weights.push(described);
    let aliases = staging.path(ALIASES);
    if aliases.is_file() {
        manifest.aliases = Some(FileEntry { file: ALIASES.to_owned(), sha256: file_sha256(&aliases)? });
    }
    Ok(vec![WEIGHTS_FILE.to_owned()])
}

/// Puts a significance table into the bundle, if it is the model's and long enough for every leaf the settings allow.
fn place_table(
    staging: &mut Staging,
    table: &Path,
    manifest: &Manifest,
    num_layers: usize,
    settings: &HomerSettings,
) -> Result<FileEntry, BundleError> {
    let sha256 = staging.place(table, SIGNIFICANCE_FILE, WeightStorage::Copy)?.unwrap_or_default();
    // The copy is what will be used, so the copy is what is checked.
    let copied = SignificanceTable::load(&staging.path(SIGNIFICANCE_FILE))
        .map_err(|error| BundleError::Table(Box::new(TableError { path: table.to_owned(), ..error })))?;
    let misfit = |problem| BundleError::TableMismatch { path: table.to_owned(), problem };
    copied.check_matches(&manifest.identity()).map_err(misfit)?;
    copied.covers(num_layers, leaf_chunk_len(*settings).saturating_sub(1)).map_err(misfit)?;
    Ok(FileEntry { file: SIGNIFICANCE_FILE.to_owned(), sha256 })
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

/// Every height that a tree over a context of up to `longest_context` tokens can have, whatever affixes of up to half a
/// chunk take of the room. Graphs are kilobytes: a bundle serves short contexts too.
///
/// # Errors
///
/// The settings are out of range, whatever the prompt.
pub fn tree_heights(
    num_layers: usize,
    settings: HomerSettings,
    longest_context: usize,
) -> Result<Vec<usize>, PlanError> {
    let chunk = leaf_chunk_len(settings).min(settings.max_chunk_len);
    let affixes = (chunk / 2).min(settings.target_len).max(1);
    let lengths = PromptLengths { prefix: affixes - 1, context: longest_context, suffix: 1 };
    let height = match HomerPlan::new(num_layers, lengths, settings) {
        Ok(plan) => plan.tree_height,
        // There is no plan for just these lengths, but there is for others that need a tree of that height.
        Err(PlanError::EmptyLeaves { leaves, .. }) => leaves.ilog2() as usize,
        Err(problem) => return Err(problem),
    };
    Ok((0..=height).collect())
}

/// Longest leaf, prefix and suffix included.
fn leaf_chunk_len(settings: HomerSettings) -> usize {
    settings.max_initial_chunk_len.unwrap_or(settings.max_chunk_len)
}
