//! Models by name: whatever a user may call a checkpoint, as a checkpoint folder.
//!
//! A folder is itself. A GGUF file, and the file of a model that can be fetched, is imported once into the cache; a model
//! of random numbers is written there once:
//!
//! ```text
//! <cache>/checkpoints/smollm2-135m-0.1.2-bcc81830d10c/     a model by name; the hash is of its package
//!                     random-pythia-70m-float32-seed-0/    random:pythia-70m
//!                     my-model.Q4_K_M-6f1c22a07d35/        a file; the hash is of its path, size and time of change
//!                     .lock
//!                     .import-XXXXXX/                      an import at work, or what a killed one left
//! ```

use crate::checkpoint::{CheckpointError, import_gguf, import_llama2c};
use crate::fetch::{self, Asset, Cache, FetchError, asset};
use crate::staging::StagingError;
use crate::synthetic::{RandomOptions, Shape, UNFINISHED, write_random};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

const FOLDER: &str = "checkpoints";
const LOCK: &str = ".lock";
/// Extension of files that can be imported.
const GGUF: &str = "gguf";
/// Extension, among fetched files, of a llama2.c model with its tokenizer behind it.
const LLAMA2C: &str = "llama2c";
/// What comes before the name of a model of random numbers.
const RANDOM: &str = "random:";

/// Why there is no checkpoint folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Neither a folder nor a file nor a model's name.
    #[error("there is no folder or file {}, and no model of that name (models: {known})", path.display())]
    Unknown {
        /// What was asked for.
        path: PathBuf,
        /// The names there are.
        known: String,
    },
    /// A file that is not a model.
    #[error("{} is a file; expected a checkpoint folder, a .gguf file or the name of a model", path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
    },
    /// The model could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The file could not be imported.
    #[error(transparent)]
    Import(#[from] Box<CheckpointError>),
    /// The random numbers could not be written.
    #[error(transparent)]
    Random(#[from] StagingError),
    /// The cache could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What is being done to get a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Its package is being fetched.
    Fetch(fetch::Progress),
    /// Its weights are being written as an ordinary checkpoint.
    Import {
        /// Elements written.
        done: u64,
        /// Elements in all.
        total: u64,
    },
    /// Random numbers are being written.
    Random {
        /// Bytes written.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
}

/// Receives [`Progress`].
pub type OnProgress<'a> = dyn FnMut(Progress) + 'a;

/// Whether `asset` is a model that [`resolve`] knows by its name.
pub fn is_model(asset: &Asset) -> bool {
    let members = asset.packages.iter().flat_map(|package| package.members);
    members.into_iter().any(|member| [GGUF, LLAMA2C].iter().any(|kind| is_kind(Path::new(member.file), kind)))
}

/// The names of all models: those that can be fetched, and those of random numbers.
pub fn names() -> impl Iterator<Item = String> {
    let fetched = asset::ALL.iter().filter(|asset| is_model(asset)).map(|asset| asset.name.to_owned());
    fetched.chain(Shape::all().iter().map(|shape| format!("{RANDOM}{}", shape.name())))
}

/// The checkpoint folder that `model` means: a folder, a GGUF file or the name of a model. Fetches, imports or writes what
/// is not in `cache` yet; a folder of the same name goes before a model.
///
/// # Errors
///
/// It is none of these, or it cannot be fetched or imported. Nothing is left in the cache then.
pub fn resolve(model: &Path, cache: &Cache, on_progress: &mut OnProgress<'_>) -> Result<PathBuf, ModelError> {
    if model.is_dir() {
        return Ok(model.to_owned());
    }
    if model.exists() {
        if !is_kind(model, GGUF) {
            return Err(ModelError::NotAModel { path: model.to_owned() });
        }
        return imported(model, &key_of_file(model)?, cache, on_progress);
    }
    let shape = model.to_str().and_then(|name| name.strip_prefix(RANDOM)).and_then(Shape::named);
    if let Some(shape) = shape {
        return random(shape, RandomOptions::default(), cache, on_progress);
    }
    match asset::ALL.iter().find(|asset| is_model(asset) && Path::new(asset.name) == model) {
        Some(asset) => fetch(asset, cache, on_progress),
        None => Err(ModelError::Unknown { path: model.to_owned(), known: names().collect::<Vec<_>>().join(", ") }),
    }
}

/// The checkpoint folder of a model that can be fetched.
///
/// # Errors
///
/// It cannot be fetched or imported. Nothing is left in the cache then.
pub fn fetch(asset: &'static Asset, cache: &Cache, on_progress: &mut OnProgress<'_>) -> Result<PathBuf, ModelError> {
    let fetched = cache.fetch(asset, &mut |progress| on_progress(Progress::Fetch(progress)))?;
    // The folder of a cache entry is named by asset, version and hash.
    let entry = fetched.path().parent().and_then(Path::file_name).unwrap_or(asset.name.as_ref());
    imported(fetched.path(), &entry.to_string_lossy(), cache, on_progress)
}

/// The checkpoint folder of a model of random numbers.
///
/// # Errors
///
/// It cannot be written. Nothing is left in the cache then.
pub fn random(
    shape: &Shape,
    options: RandomOptions,
    cache: &Cache,
    on_progress: &mut OnProgress<'_>,
) -> Result<PathBuf, ModelError> {
    let key = format!("random-{}-{}-seed-{}", shape.name(), options.dtype.torch_name(), options.seed);
    made(&key, cache, |goal| {
        match write_random(shape, goal, options, |done, total| {
            on_progress(Progress::Random { done, total });
        }) {
            Err(StagingError::Exists { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
}

/// The folder called `key` in the cache, imported from `file` if it is not there.
fn imported(file: &Path, key: &str, cache: &Cache, on_progress: &mut OnProgress<'_>) -> Result<PathBuf, ModelError> {
    made(key, cache, |goal| {
        let progress = |done, total| on_progress(Progress::Import { done, total });
        let imported = if is_kind(file, LLAMA2C) {
            import_llama2c(file, goal, progress)
        } else {
            import_gguf(file, goal, progress)
        };
        match imported {
            Err(CheckpointError::Exists { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(Box::new(error).into()),
        }
    })
}

/// The folder called `key` in the cache, which `make` makes if it is not there. Where there are no locks another process
/// may be first; its folder is as good, and `make` is not to complain of it.
fn made(key: &str, cache: &Cache, make: impl FnOnce(&Path) -> Result<(), ModelError>) -> Result<PathBuf, ModelError> {
    let folder = cache.folder().join(FOLDER);
    let goal = folder.join(key);
    // Folders get their names when they are complete.
    if goal.is_dir() {
        return Ok(goal);
    }
    fs::create_dir_all(&folder).map_err(io_error(&folder))?;
    let _lock = lock(&folder)?;
    if !goal.is_dir() {
        make(&goal)?;
    }
    Ok(goal)
}

/// Takes the lock of the folder and removes what killed imports left behind. `None` where the file system has no locks.
fn lock(folder: &Path) -> Result<Option<File>, ModelError> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(io_error(&path))?;
    match file.lock() {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(None),
        result => result.map_err(io_error(&path))?,
    }
    for entry in fs::read_dir(folder).map_err(io_error(folder))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            // What cannot be removed only takes up space.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(Some(file))
}

/// The file's name and a hash of its path, size and time of change: another file, or a changed one, has another key.
fn key_of_file(file: &Path) -> Result<String, ModelError> {
    const HASH_DIGITS: usize = 12;
    let path = fs::canonicalize(file).map_err(io_error(file))?;
    let meta = fs::metadata(&path).map_err(io_error(file))?;
    let changed = meta.modified().map_err(io_error(file))?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let mut digest = Sha256::new();
    digest.update(path.as_os_str().as_encoded_bytes());
    digest.update(meta.len().to_le_bytes());
    digest.update(changed.to_le_bytes());
    let hash = format!("{:x}", digest.finalize());
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok(format!("{stem}-{}", &hash[..HASH_DIGITS]))
}

fn is_kind(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> ModelError + '_ {
    move |source| ModelError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn never(progress: Progress) {
        panic!("nothing had to be done, and yet: {progress:?}")
    }

    #[test]
    fn a_folder_is_itself_even_if_a_model_has_its_name() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("smollm2-135m");
        fs::create_dir(&folder).unwrap();
        assert_eq!(resolve(&folder, &Cache::at(root.path()), &mut never).unwrap(), folder);
    }

    #[test]
    fn what_is_no_model_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().join("cache"));
        let refusal = |model: &Path| resolve(model, &cache, &mut never).unwrap_err().to_string();
        let message = refusal(Path::new("smollm"));
        assert!(message.contains("no folder or file smollm") && message.contains("smollm2-135m"), "{message}");
        assert!(!names().any(|name| name == "emma"), "a text is no model");
        let message = refusal(Path::new("random:pythia-7b"));
        assert!(message.contains("random:pythia-70m") && message.contains("stories15m"), "{message}");
        let file = root.path().join("config.json");
        fs::write(&file, "{}").unwrap();
        assert!(refusal(&file).contains("expected a checkpoint folder"), "{}", refusal(&file));
    }

    #[test]
    fn a_bad_gguf_file_leaves_nothing_and_a_killed_import_is_cleared_away() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().join("cache"));
        let folder = cache.folder().join(FOLDER);
        fs::create_dir_all(folder.join(".import-killed/checkpoint")).unwrap();
        let file = root.path().join("bad.gguf");
        fs::write(&file, "GGUF, but no more than that").unwrap();
        let message = resolve(&file, &cache, &mut never).unwrap_err().to_string();
        assert!(message.contains("bad.gguf"), "{message}");
        let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [LOCK]);
    }

    #[test]
    fn a_changed_file_has_another_key() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("model.gguf");
        fs::write(&file, "one").unwrap();
        let key = key_of_file(&file).unwrap();
        assert!(key.starts_with("model-"), "{key}");
        assert_eq!(key_of_file(&file).unwrap(), key);
        fs::write(&file, "three").unwrap();
        assert_ne!(key_of_file(&file).unwrap(), key);
    }
}
