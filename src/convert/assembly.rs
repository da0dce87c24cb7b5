//! A checkpoint put together from the files of another one, further names for its tensors, and at most one new file.

use super::{ConvertError, Converted};
use crate::checkpoint::{
    ALIASES, Checkpoint, CheckpointError, INDEX, NamedShape, SIDE_FILES, SINGLE, aliases_json, index_json,
    safetensors_header,
};
use crate::staging::{Kind, Placement, Staging};
use accordion_graphs::dtype::DType;
use accordion_graphs::weights::{WeightIndex, WeightRef};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Only what a conversion wrote is replaced: nobody else's folder has aliases.
const CONVERTED: Kind = Kind { noun: "converted checkpoint", marker: ALIASES, prefix: ".accordion-convert-" };
/// Name of the source's only file where it is one of two: `model.safetensors` would hide the index.
const BASE: &str = "model-base.safetensors";

/// What a conversion adds to its source, whose weights the new checkpoint links to.
pub(super) struct Assembly<'a> {
    pub(super) source: &'a Checkpoint,
    /// Further names, and the tensors that they mean: of the source, or new ones.
    pub(super) aliases: Vec<(String, String)>,
    pub(super) new: Option<NewFile<'a>>,
    /// JSON files by name; those of the source are taken over unless they are among them.
    pub(super) descriptions: Vec<(&'static str, Value)>,
}

/// A file of tensors that the source does not have.
pub(super) struct NewFile<'a> {
    pub(super) name: &'static str,
    pub(super) dtype: DType,
    pub(super) tensors: Vec<NamedShape>,
    /// Writes the tensors' bytes behind the header, or makes the file long enough for zeros.
    pub(super) fill: &'a dyn Fn(&mut File) -> io::Result<()>,
}

impl Assembly<'_> {
    /// Writes the new checkpoint into the folder `out`.
    pub(super) fn write(self, out: &Path, force: bool) -> Result<Converted, ConvertError> {
        let source = self.source;
        let mut staging = Staging::create(out, CONVERTED, force)?;
        let index = self.index(&out.join(ALIASES))?;
        let names = names(index.files())?;
        for (from, name) in source.weights().files().iter().zip(&names) {
            staging.place(from, name, Placement::Link)?;
        }
        if let Some(new) = &self.new {
            let header = safetensors_header(new.dtype, new.tensors.iter().cloned());
            staging.write_with(new.name, |file| {
                io::Write::write_all(file, &header)?;
                (new.fill)(file)
            })?;
        }
        if names.len() > 1 {
            let tensors = index.stored().map(|(name, weight)| (name, names[weight.file].as_str()));
            staging.write_json(INDEX, &index_json(tensors, index.byte_count()))?;
        }
        staging.write_json(ALIASES, &aliases_json(index.aliases()))?;
        for (name, content) in &self.descriptions {
            staging.write_json(name, content)?;
        }
        let is_described = |file: &&str| self.descriptions.iter().any(|(name, _)| name == file);
        for file in SIDE_FILES.into_iter().filter(|file| !is_described(file)) {
            let from = source.dir().join(file);
            if from.is_file() {
                staging.place(&from, file, Placement::Copy)?;
            }
        }
        let converted = Converted {
            bytes_written: staging.bytes_written(),
            aliases: index.aliases().len(),
            link_failure: staging.link_failure().map(str::to_owned),
        };
        staging.publish()?;
        Ok(converted)
    }

    /// All tensors under all of their names; `origin` is the file that will list the names.
    fn index(&self, origin: &Path) -> Result<WeightIndex, ConvertError> {
        let weights = self.source.weights();
        let mut files = weights.files().to_vec();
        let mut tensors: BTreeMap<String, WeightRef> =
            weights.stored().map(|(name, weight)| (name.to_owned(), weight.clone())).collect();
        if let Some(new) = &self.new {
            let (file, dtype) = (files.len(), new.dtype);
            files.push(new.name.into());
            for (name, shape) in &new.tensors {
                let len = (shape.iter().product::<usize>() * dtype.size()) as u64;
                tensors.insert(name.clone(), WeightRef { file, offset: 0, len, shape: shape.clone(), dtype });
            }
        }
        let mut index = WeightIndex::new(files, tensors);
        for (alias, target) in weights.aliases().clone().into_iter().chain(self.aliases.iter().cloned()) {
            let target = weights.aliases().get(&target).unwrap_or(&target).clone();
            index.alias(&alias, &target).map_err(|problem| {
                Box::new(CheckpointError::Alias { path: origin.to_owned(), alias, target, problem })
            })?;
        }
        Ok(index)
    }
}

/// What the weight files are called in the new checkpoint: a single one has the name that needs no index, and one of
/// several must not have it.
fn names(files: &[PathBuf]) -> Result<Vec<String>, ConvertError> {
    let name = |path: &PathBuf| match (files.len(), path.file_name().and_then(|name| name.to_str())) {
        (1, _) => Ok(SINGLE.to_owned()),
        (_, Some(SINGLE)) => Ok(BASE.to_owned()),
        (_, Some(name)) => Ok(name.to_owned()),
        (_, None) => Err(ConvertError::FileName { path: path.clone() }),
    };
    files.iter().map(name).collect()
}
