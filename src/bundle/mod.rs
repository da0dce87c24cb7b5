//! Bundles: the exported folder of graphs, links to the weights, the tokenizer and `bundle.json`.

mod error;
mod export;
mod manifest;

pub use error::BundleError;
pub(crate) use export::second_decoder;
pub use export::{ExportOptions, Exported, MethodSettings, export, tree_heights};
pub use manifest::{FileEntry, GraphEntry, Manifest, Method, WeightFile};

pub use crate::staging::Placement as WeightStorage;

use crate::checkpoint::{WeightMaps, add_aliases, check_parts, check_tensors, read_index};
use crate::precision;
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::architecture::{Architecture, Llama};
use accordion_graphs::onnx::{GraphSignature, ValueInfo};
use std::path::{Path, PathBuf};

/// Name of the file that makes a folder a bundle.
pub const MANIFEST_FILE: &str = "bundle.json";

/// Name of the significance table in a bundle.
const SIGNIFICANCE_FILE: &str = "significance.safetensors";

/// A bundle on disk, opened and checked against its manifest.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
    weights: WeightMaps,
}

impl Bundle {
    /// Opens the bundle in `dir`: the manifest is read, and every weight file is checked to be the one it was exported
    /// for. Graph files are checked when they are read.
    ///
    /// # Errors
    ///
    /// The folder is not a bundle, its manifest is damaged, a weight file changed since the export, or a quantized matrix cannot
    /// be one.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, BundleError> {
        let dir = dir.into();
        let manifest = Manifest::read(&dir.join(MANIFEST_FILE))?;
        if let Some(quantization) = &manifest.quantization {
            precision::check_forms(quantization, &manifest.required_tensors())?;
        }
        let mut files = Vec::with_capacity(manifest.weights.len());
        for weight in &manifest.weights {
            let path = dir.join(&weight.file);
            weight.check(&path)?;
            files.push(path);
        }
        let mut index = read_index(&files).map_err(Box::new)?;
        if let Some(entry) = &manifest.aliases {
            add_aliases(&entry.check(&dir)?, &mut index).map_err(Box::new)?;
        }
        let (quantized, float) =
            manifest.stored_tensors().into_iter().partition::<Vec<_>, _>(|(_, dtype)| dtype.is_some());
        check_tensors(float.into_iter().map(|(tensor, _)| tensor), &index, &dir, MANIFEST_FILE).map_err(Box::new)?;
        let parts = quantized.into_iter().filter_map(|(tensor, dtype)| Some((tensor, dtype?)));
        check_parts(parts, &index, &dir, MANIFEST_FILE).map_err(Box::new)?;
        let weights = WeightMaps::open(index).map_err(Box::new)?;
        if let Some(quantization) = &manifest.quantization {
            precision::check_scales(&weights, quantization)?;
        }
        Ok(Self { dir, manifest, weights })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `bundle.json` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The decoder.
    pub fn architecture(&self) -> &Architecture {
        &self.manifest.architecture
    }

    /// The decoder, where only a Llama will do.
    ///
    /// # Errors
    ///
    /// It is not of the Llama family.
    pub fn llama(&self) -> Result<&Llama, BundleError> {
        match &self.manifest.architecture {
            Architecture::Llama(llama) => Ok(llama),
            other => Err(BundleError::invalid(
                &self.dir.join(MANIFEST_FILE),
                format!("architecture {other:?} is not supported"),
            )),
        }
    }

    /// The weights that the graphs link to.
    pub fn weights(&self) -> &WeightMaps {
        &self.weights
    }

    /// The interface of graph `name`, if the bundle has it.
    pub fn signature(&self, name: &str) -> Option<&GraphSignature> {
        self.manifest.graphs.get(name).map(|entry| &entry.signature)
    }

    /// Forgets the taps of its graphs whose values `keep` does not want, because what runs them cannot show them.
    pub fn keep_taps(&mut self, keep: impl Fn(&GraphSignature, &ValueInfo) -> bool) {
        for entry in self.manifest.graphs.values_mut() {
            let mut taps = std::mem::take(&mut entry.signature.taps);
            taps.retain(|_, value| keep(&entry.signature, value));
            entry.signature.taps = taps;
        }
    }

    /// The ONNX file of graph `name`, checked against the hash that the export recorded.
    ///
    /// # Errors
    ///
    /// There is no such graph, or its file cannot be read or changed since the export.
    pub fn graph(&self, name: &str) -> Result<Vec<u8>, BundleError> {
        let entry = self
            .manifest
            .graphs
            .get(name)
            .ok_or_else(|| BundleError::MissingGraph { dir: self.dir.clone(), name: name.to_owned() })?;
        entry.read(&self.dir.join(&entry.file))
    }

    /// The significance table of the bundle, if it has one.
    ///
    /// # Errors
    ///
    /// The file changed since the export, cannot be read, or was made for another model or rotary embedding.
    pub fn significance(&self) -> Result<Option<SignificanceTable>, BundleError> {
        let Some(entry) = &self.manifest.significance else {
            return Ok(None);
        };
        let path = entry.check(&self.dir)?;
        let table = SignificanceTable::load(&path).map_err(|error| BundleError::Table(Box::new(error)))?;
        table
            .check_matches(&self.manifest.identity())
            .map_err(|problem| BundleError::TableMismatch { path, problem })?;
        Ok(Some(table))
    }
}
