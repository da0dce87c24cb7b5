//! `bundle.json`: what a bundle holds and what it was made from.

use super::BundleError;
use crate::checkpoint::{
    Checkpoint, Disagreement, NamedShape, architecture_json, decoder_tensors, disagreement, encoder_from_json,
    encoder_json, from_config_json, identity_of, rcc_tensors, sharedllm_tensors,
};
use crate::precision::Quantization;
use accordion_calibration::significance::ModelIdentity;
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::methods::plain::DECODER_KV_INT8;
use accordion_graphs::onnx::GraphSignature;
use accordion_graphs::plan::homer::HomerSettings;
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use accordion_graphs::precision::{KvCache, Precision};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Version of the format.
const SCHEMA: &str = "accordion.bundle/1";
/// A manifest is kilobytes; anything longer is not one.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// A graph without its weights is kilobytes to a few megabytes.
const MAX_GRAPH_BYTES: u64 = 1 << 30;
/// safetensors headers are at most this long.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// What the bundle does to a context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Method {
    /// Nothing: the whole context through the model.
    Plain,
    /// Hierarchical context merging.
    Homer {
        /// Default settings; a run may use others that need the same graphs.
        settings: HomerSettings,
        /// Tree heights there are graphs for.
        tree_heights: Vec<usize>,
    },
    /// Recurrent context compression.
    Rcc {
        /// What decides the graphs.
        settings: RccSettings,
    },
    /// Context tree and self-injection.
    #[serde(rename = "sharedllm")]
    SharedLlm {
        /// What decides the graphs.
        settings: SharedLlmSettings,
    },
}

impl Method {
    /// The word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Homer { .. } => "homer",
            Self::Rcc { .. } => "rcc",
            Self::SharedLlm { .. } => "sharedllm",
        }
    }
}

/// The content of `bundle.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub schema: String,
    /// What wrote it.
    pub producer: String,
    /// The method.
    pub method: Method,
    /// What runtime the graphs are written for.
    pub target: Target,
    /// What numbers the graphs compute with.
    pub precision: Precision,
    /// How the tensors differ from the checkpoint's, where they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// What numbers the decoder's cache holds behind a context.
    #[serde(default, skip_serializing_if = "KvCache::is_default")]
    pub kv_cache: KvCache,
    /// The decoder.
    pub architecture: Architecture,
    /// What the checkpoint holds besides the decoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressor: Option<Compressor>,
    /// Hash that names the model: of its configuration and tensor layout.
    pub fingerprint: String,
    /// The weight files.
    pub weights: Vec<WeightFile>,
    /// Further names of tensors in the weight files, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aliases: Option<FileEntry>,
    /// The graphs by name.
    pub graphs: BTreeMap<String, GraphEntry>,
    /// The significance table, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub significance: Option<FileEntry>,
}

/// A file that is only what it was at export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name inside the bundle.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// A weight file as it was at export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightFile {
    /// Name inside the bundle.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970 of the last change.
    pub modified_ns: u64,
    /// SHA-256 of the safetensors header: names, shapes and places of all tensors.
    pub header_sha256: String,
    /// SHA-256 of the file, known where the export copied it: such a bundle may be moved by means that do not keep the
    /// time of the last change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// A graph file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphEntry {
    /// Name inside the bundle.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Its interface.
    pub signature: GraphSignature,
}

impl Manifest {
    /// An empty manifest of this version.
    pub(super) fn new(method: Method, target: Target, checkpoint: &Checkpoint) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            producer: format!("accordion {}", env!("CARGO_PKG_VERSION")),
            method,
            target,
            precision: Precision::Fp32,
            quantization: None,
            kv_cache: KvCache::Fp32,
            architecture: checkpoint.architecture().clone(),
            compressor: checkpoint.compressor().cloned(),
            fingerprint: checkpoint.fingerprint(),
            weights: Vec::new(),
            aliases: None,
            graphs: BTreeMap::new(),
            significance: None,
        }
    }

    /// The model with the rotary embedding of the graphs, for tables that hold only for these.
    pub fn identity(&self) -> ModelIdentity {
        identity_of(self.fingerprint.clone(), &self.architecture)
    }

    /// Reads and checks the manifest `path`.
    pub(super) fn read(path: &Path) -> Result<Self, BundleError> {
        if !path.exists() {
            return Err(BundleError::invalid(path, "there is no such file, so its folder is not a bundle"));
        }
        let bytes = read_bounded(path, MAX_MANIFEST_BYTES)?;
        let json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| BundleError::invalid(path, format!("not valid JSON: {e}")))?;
        let schema = json.get("schema").and_then(serde_json::Value::as_str).unwrap_or("missing");
        if schema != SCHEMA {
            return Err(BundleError::invalid(path, format!("schema is '{schema}', expected '{SCHEMA}'")));
        }
        let manifest: Self = serde_json::from_value(json).map_err(|e| BundleError::invalid(path, e.to_string()))?;
        let weights = manifest.weights.iter().map(|weight| &weight.file);
        let graphs = manifest.graphs.values().map(|graph| &graph.file);
        let others = manifest.aliases.iter().chain(&manifest.significance).map(|entry| &entry.file);
        for file in weights.chain(graphs).chain(others) {
            if !is_plain_name(file) {
                return Err(BundleError::invalid(path, format!("file name '{file}' must not leave the bundle")));
            }
        }
        manifest.check_architecture(path)?;
        Ok(manifest)
    }

    /// The architectures must be ones that a config.json could have brought in: what follows relies on their numbers.
    fn check_architecture(&self, path: &Path) -> Result<(), BundleError> {
        let contradiction = |what: &str| Err(BundleError::invalid(path, format!("{what} contradicts itself")));
        let read_back = |model: &Architecture| from_config_json(&architecture_json(model), path).map_err(Box::new);
        if read_back(&self.architecture)? != self.architecture {
            return contradiction("the architecture");
        }
        match &self.compressor {
            None => {}
            Some(Compressor::Rcc(model)) => {
                let encoder = encoder_from_json(&encoder_json(&model.encoder), path).map_err(Box::new)?;
                if encoder != model.encoder {
                    return contradiction("the encoder");
                }
            }
            Some(Compressor::SharedLlm(model)) => {
                let Architecture::Llama(upper) = &self.architecture else {
                    return Err(BundleError::invalid(path, "only a Llama can have SharedLLM's lower model"));
                };
                let lower = Architecture::Llama(model.lower.clone());
                if read_back(&lower)? != lower {
                    return contradiction("the lower model");
                }
                if let Some(Disagreement { field, found, expected }) = disagreement(upper, model) {
                    return Err(BundleError::invalid(path, format!("{field} is {found}, expected {expected}")));
                }
            }
            Some(_) => return Err(BundleError::invalid(path, "the compressor is not known")),
        }
        if self.kv_cache == KvCache::Int8 && !self.graphs.contains_key(DECODER_KV_INT8) {
            return Err(BundleError::invalid(
                path,
                format!("kv_cache is int8, but there is no graph {DECODER_KV_INT8}"),
            ));
        }
        self.check_settings(path)
    }

    /// Settings and compressor must fit the method.
    fn check_settings(&self, path: &Path) -> Result<(), BundleError> {
        let checked = match (&self.method, &self.compressor) {
            (Method::Plain | Method::Homer { .. }, _) => Ok(()),
            (Method::Rcc { settings }, Some(Compressor::Rcc(model))) => {
                settings.check().and_then(|()| settings.check_encoder(&model.encoder, self.architecture.num_layers()))
            }
            (Method::SharedLlm { settings }, Some(Compressor::SharedLlm(_))) => settings.levels().map(drop),
            (method, _) => {
                let problem = format!("method {} needs a compressor of its own, and there is none", method.name());
                return Err(BundleError::invalid(path, problem));
            }
        };
        checked.map_err(|problem| BundleError::invalid(path, problem.to_string()))
    }

    /// The precision in words, with the cache's where that is not fp32.
    pub fn numbers(&self) -> String {
        match self.kv_cache {
            KvCache::Fp32 => self.precision.to_string(),
            KvCache::Int8 => format!("{}, kv int8", self.precision),
        }
    }

    /// The 16-bit format that nodes of the graphs take and give, if there is one: neither for graphs over weights of 16 bits
    /// that compute in fp32, nor for those that only round to the format.
    pub fn float16(&self) -> Option<DType> {
        let rounding = self.quantization.as_ref()?.rounding.as_ref()?;
        (self.target == Target::Portable && !rounding.emulated).then_some(rounding.format)
    }

    /// Every tensor of the bundle's weight files that its graphs may need, with its type where that is not the checkpoint's.
    pub(super) fn stored_tensors(&self) -> Vec<(NamedShape, Option<DType>)> {
        let tensors = self.required_tensors();
        match &self.quantization {
            Some(quantization) => quantization.stored(tensors),
            None => tensors.into_iter().map(|tensor| (tensor, None)).collect(),
        }
    }

    /// Every tensor of the model that the bundle's graphs may need, with its shape.
    pub(crate) fn required_tensors(&self) -> Vec<NamedShape> {
        let mut tensors = decoder_tensors(&self.architecture);
        match (&self.method, &self.compressor, &self.architecture) {
            (Method::Rcc { settings }, Some(Compressor::Rcc(model)), decoder) => {
                tensors.extend(rcc_tensors(model, decoder, *settings));
            }
            (Method::SharedLlm { .. }, Some(Compressor::SharedLlm(model)), Architecture::Llama(upper)) => {
                tensors.extend(sharedllm_tensors(model, upper));
            }
            _ => {}
        }
        tensors
    }
}

fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\'])
}

/// Opens a regular file. Pipes and devices, which may never end, are refused.
fn open_file(path: &Path) -> Result<(File, fs::Metadata), BundleError> {
    let meta = fs::metadata(path).map_err(BundleError::io(path))?;
    if !meta.is_file() {
        return Err(BundleError::invalid(path, "not a regular file"));
    }
    Ok((File::open(path).map_err(BundleError::io(path))?, meta))
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, BundleError> {
    let (file, _) = open_file(path)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(BundleError::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(BundleError::invalid(path, format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

impl WeightFile {
    /// Describes the file at `path`, called `file` in the bundle.
    pub(super) fn describe(path: &Path, file: String) -> Result<Self, BundleError> {
        let (mut open, meta) = open_file(path)?;
        let modified = meta.modified().map_err(BundleError::io(path))?;
        let mut length = [0; 8];
        open.read_exact(&mut length).map_err(BundleError::io(path))?;
        let header_len = u64::from_le_bytes(length);
        if header_len > MAX_HEADER_BYTES || header_len > meta.len() {
            return Err(BundleError::invalid(
                path,
                format!("header of {header_len} bytes in a file of {}", meta.len()),
            ));
        }
        let mut header = Vec::new();
        open.take(header_len).read_to_end(&mut header).map_err(BundleError::io(path))?;
        Ok(Self {
            file,
            size: meta.len(),
            modified_ns: modified.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
            header_sha256: sha256(&header),
            sha256: None,
        })
    }

    /// Whether the file at `path` is still the one described.
    pub(super) fn check(&self, path: &Path) -> Result<(), BundleError> {
        let found = Self::describe(path, self.file.clone())?;
        let changed = |what, expected: String, found: String| {
            Err(BundleError::Changed { path: path.to_owned(), what, expected, found })
        };
        if found.size != self.size {
            return changed("size in bytes", self.size.to_string(), found.size.to_string());
        }
        if found.header_sha256 != self.header_sha256 {
            return changed("header hash", self.header_sha256.clone(), found.header_sha256);
        }
        if found.modified_ns != self.modified_ns {
            let Some(expected) = &self.sha256 else {
                let [expected, found] = [self, &found].map(|file| format!("{} ns since 1970", file.modified_ns));
                return changed("time of the last change", expected, found);
            };
            let found = file_sha256(path)?;
            if found != *expected {
                return changed("SHA-256", expected.clone(), found);
            }
        }
        Ok(())
    }
}

/// SHA-256 of a file of any length.
pub(super) fn file_sha256(path: &Path) -> Result<String, BundleError> {
    let (mut file, _) = open_file(path)?;
    let mut digest = Sha256::new();
    std::io::copy(&mut file, &mut digest).map_err(BundleError::io(path))?;
    Ok(format!("{:x}", digest.finalize()))
}

impl FileEntry {
    /// The path of the file in the bundle `dir`, if the file is the one that was exported.
    pub(super) fn check(&self, dir: &Path) -> Result<PathBuf, BundleError> {
        let path = dir.join(&self.file);
        let found = file_sha256(&path)?;
        if found != self.sha256 {
            return Err(BundleError::Changed { path, what: "SHA-256", expected: self.sha256.clone(), found });
        }
        Ok(path)
    }
}

impl GraphEntry {
    /// The file's bytes, if they are those that were exported.
    pub(super) fn read(&self, path: &Path) -> Result<Vec<u8>, BundleError> {
        let bytes = read_bounded(path, MAX_GRAPH_BYTES)?;
        let found = sha256(&bytes);
        if found != self.sha256 {
            let (path, expected) = (path.to_owned(), self.sha256.clone());
            return Err(BundleError::Changed { path, what: "SHA-256", expected, found });
        }
        Ok(bytes)
    }
}
