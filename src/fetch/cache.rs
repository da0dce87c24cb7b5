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
                // A client that outlived its killed parent may still be writing there: the next fetch gets the rest.
                let _ = fs::remove_dir_all(entry.path());
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::super::archive::tests::zip_of;
    use super::super::asset::{Member, Registry};
    use super::*;
    use sha2::{Digest as _, Sha256};
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const TEXT: &[u8] = b"Call me Ishmael.";
    const MEMBERS: &[Member] = &[Member::whole("moby/book.txt", 16, "book.txt")];
    const ASSET: Asset =
        Asset { name: "book", title: "", licence: "", instead: "bring a book of your own", packages: &[] };

    /// An archive and the package that pins it. Packages live in a static table, so the test leaks its own.
    fn book() -> (Vec<u8>, &'static Package) {
        let archive = zip_of(&[("moby/book.txt", TEXT)]);
        let sha256 = String::leak(format!("{:x}", Sha256::digest(&archive)));
        let package = Package {
            registry: Registry::Pypi,
            name: "moby",
            version: "1.0",
            archive: "moby.whl",
            bytes: archive.len() as u64,
            sha256,
            platform: None,
            members: MEMBERS,
        };
        (archive, Box::leak(Box::new(package)))
    }

    fn fetch(
        cache: &Cache,
        package: &'static Package,
        obtain: impl FnOnce(&Path, &mut dyn FnMut(u64)) -> Result<PathBuf, FetchError>,
    ) -> Result<Fetched, FetchError> {
        cache.fetch_with(&ASSET, package, &mut |_| {}, obtain)
    }

    fn delivers(archive: &[u8]) -> impl FnOnce(&Path, &mut dyn FnMut(u64)) -> Result<PathBuf, FetchError> {
        move |folder, on_bytes| {
            let path = folder.join("moby.whl");
            fs::write(&path, archive).context("write", &path)?;
            on_bytes(archive.len() as u64);
            Ok(path)
        }
    }

    fn never(_: &Path, _: &mut dyn FnMut(u64)) -> Result<PathBuf, FetchError> {
        panic!("an asset in the cache was downloaded again")
    }

    /// Names of everything in the cache but locks.
    fn listing(cache: &Cache) -> Vec<String> {
        let entries = fs::read_dir(cache.folder()).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.contains(".lock")).collect()
    }

    #[test]
    fn fetched_once_then_reused() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().join("new/folder"));
        let (archive, package) = book();
        let mut stages = Vec::new();
        let fetched = cache.fetch_with(&ASSET, package, &mut |p| stages.push(p), delivers(&archive)).unwrap();
        assert_eq!(fs::read(fetched.path()).unwrap(), TEXT);
        let total = archive.len() as u64;
        let expected = [(Stage::Download, total), (Stage::Verify, total), (Stage::Extract, 16)];
        assert_eq!(stages.iter().map(|p| (p.stage, p.done)).collect::<Vec<_>>(), expected);
        assert!(stages.iter().all(|p| p.done == p.total && p.asset == "book"));

        assert_eq!(fetch(&cache, package, never).unwrap(), fetched);
        assert_eq!(listing(&cache), [entry_name(&ASSET, package)]);
    }

    #[test]
    fn another_archive_is_refused_with_both_hashes() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let (archive, package) = book();
        let mut changed = archive.clone();
        *changed.last_mut().unwrap() ^= 1;
        let message = fetch(&cache, package, delivers(&changed)).unwrap_err().to_string();
        assert!(message.contains(package.sha256), "{message}");
        assert!(message.contains(&format!("{:x}", Sha256::digest(&changed))), "{message}");
        assert!(listing(&cache).is_empty(), "{:?}", listing(&cache));
        assert_eq!(cache.entry(&ASSET, package), None);
        // The same cache accepts the right one afterwards.
        fetch(&cache, package, delivers(&archive)).unwrap();
    }

    #[test]
    fn a_damaged_entry_is_fetched_again() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let (archive, package) = book();
        for damage in [
            |entry: &Path| fs::write(entry.join("book.txt"), "Call me").unwrap(),
            |entry: &Path| fs::remove_file(entry.join("book.txt")).unwrap(),
            |entry: &Path| fs::remove_file(entry.join(MARKER)).unwrap(),
            |entry: &Path| fs::write(entry.join(MARKER), "{").unwrap(),
        ] {
            fetch(&cache, package, delivers(&archive)).unwrap();
            damage(&cache.entry_folder(&ASSET, package));
            assert_eq!(cache.entry(&ASSET, package), None);
            let fetched = fetch(&cache, package, delivers(&archive)).unwrap();
            assert_eq!(fs::read(fetched.path()).unwrap(), TEXT);
            assert_eq!(listing(&cache).len(), 1);
        }
    }

    #[test]
    fn what_a_killed_fetch_left_is_not_accepted_and_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let (archive, package) = book();
        let left = cache.folder().join(format!("{}killed", partial_prefix(&ASSET, package)));
        fs::create_dir_all(left.join("entry")).unwrap();
        fs::write(left.join("entry/book.txt"), TEXT).unwrap();
        assert_eq!(cache.entry(&ASSET, package), None);
        fetch(&cache, package, delivers(&archive)).unwrap();
        assert_eq!(listing(&cache), [entry_name(&ASSET, package)]);
    }

    #[test]
    fn fetches_at_once_download_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let (archive, package) = book();
        let downloads = AtomicUsize::new(0);
        let together = Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    together.wait();
                    let fetched = fetch(&cache, package, |folder, on_bytes| {
                        downloads.fetch_add(1, Ordering::Relaxed);
                        delivers(&archive)(folder, on_bytes)
                    });
                    assert_eq!(fs::read(fetched.unwrap().path()).unwrap(), TEXT);
                });
            }
        });
        assert_eq!(downloads.into_inner(), 1);
    }

    #[test]
    fn the_first_rename_wins_where_there_are_no_locks() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let (archive, package) = book();
        let winner = fetch(&cache, package, delivers(&archive)).unwrap();
        let partial = tempfile::tempdir_in(root.path()).unwrap();
        let built = partial.path().join("entry");
        fs::create_dir(&built).unwrap();
        fs::write(built.join("book.txt"), TEXT).unwrap();
        assert_eq!(cache.accept(&ASSET, package, &built, partial.path()).unwrap(), winner);
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
        let cache = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
            Cache::from_variables(find).map(|cache| cache.folder)
        };
        let all = [("ACCORDION_CACHE", "/a"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(cache(&all).unwrap(), Path::new("/a"));
        assert_eq!(cache(&all[1..]).unwrap(), Path::new("/x/accordion"));
        assert_eq!(cache(&all[2..]).unwrap(), Path::new("/h/.cache/accordion"));
        assert_eq!(
            cache(&[("ACCORDION_CACHE", ""), ("XDG_CACHE_HOME", "x"), all[2]]).unwrap(),
            Path::new("/h/.cache/accordion")
        );
        assert!(cache(&[("ACCORDION_CACHE", "here")]).unwrap().is_absolute());
        let message = cache(&[("HOME", "")]).unwrap_err().to_string();
        assert!(message.contains("ACCORDION_CACHE"), "{message}");
    }

    #[test]
    fn a_cache_that_cannot_be_made_is_named() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let (archive, package) = book();
        let message = fetch(&Cache::at(file.join("cache")), package, delivers(&archive)).unwrap_err().to_string();
        assert!(message.contains("file/cache: cannot create"), "{message}");
    }
}
