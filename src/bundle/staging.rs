//! A bundle in the making: a folder beside its goal that takes the goal's name when it is complete.
//!
//! ```text
//! <parent>/.accordion-export-XXXXXX/bundle/     being written, bundle.json last
//!                                   replaced/   the old bundle, while the new one takes its place
//!          <goal>/                              after the rename
//! ```
//!
//! A killed export leaves at most the folder that begins with a dot, and no reader accepts what lacks bundle.json.

use super::{BundleError, MANIFEST_FILE, WeightStorage};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Dropped before [`Staging::publish`], it leaves nothing behind.
pub(super) struct Staging {
    temporary: TempDir,
    content: PathBuf,
    goal: PathBuf,
    replace: bool,
    bytes_written: u64,
    link_failure: Option<String>,
}

impl Staging {
    /// Starts a folder that will become `goal`, which must not exist or, with `replace`, be a bundle.
    pub(super) fn create(goal: &Path, replace: bool) -> Result<Self, BundleError> {
        check_goal(goal, replace)?;
        let parent = goal.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::Builder::new()
            .prefix(".accordion-export-")
            .tempdir_in(parent)
            .map_err(BundleError::io(parent))?;
        // A folder of its own inside: temporary folders are private to the user, a bundle need not be.
        let content = temporary.path().join("bundle");
        fs::create_dir(&content).map_err(BundleError::io(&content))?;
        Ok(Self { temporary, content, goal: goal.to_owned(), replace, bytes_written: 0, link_failure: None })
    }

    /// Where the file called `name` is for now.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.content.join(name)
    }

    /// Bytes written so far; links have none.
    pub(super) fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// The first file that had to be copied because it could not be linked, and why.
    pub(super) fn link_failure(&self) -> Option<&str> {
        self.link_failure.as_deref()
    }

    /// Writes a new file.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), BundleError> {
        let mut file = self.create_new(name)?;
        file.write_all(bytes).map_err(BundleError::io(&self.goal.join(name)))?;
        self.bytes_written += bytes.len() as u64;
        Ok(())
    }

    /// Puts the file `from` into the folder as `name`: a hard link if it may be one and can be, else a copy that keeps
    /// the modification time. Returns the SHA-256 of what was copied.
    pub(super) fn place(
        &mut self,
        from: &Path,
        name: &str,
        storage: WeightStorage,
    ) -> Result<Option<String>, BundleError> {
        // A link to a symbolic link would dangle where the bundle lies: link what it points to.
        let from = fs::canonicalize(from).map_err(BundleError::io(from))?;
        if storage == WeightStorage::Link {
            match fs::hard_link(&from, self.path(name)) {
                Ok(()) => return Ok(None),
                Err(problem) if problem.kind() == ErrorKind::AlreadyExists => return Err(taken(&from, name)),
                Err(problem) => {
                    self.link_failure.get_or_insert_with(|| format!("{}: {problem}", from.display()));
                }
            }
        }
        self.copy(&from, name).map(Some)
    }

    fn copy(&mut self, from: &Path, name: &str) -> Result<String, BundleError> {
        const BUFFER: usize = 1 << 20;
        let mut source = File::open(from).map_err(BundleError::io(from))?;
        let modified = source.metadata().and_then(|meta| meta.modified()).map_err(BundleError::io(from))?;
        let mut target = self.create_new(name)?;
        let to = &self.goal.join(name);
        let mut digest = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = source.read(&mut buffer).map_err(BundleError::io(from))?;
            if n == 0 {
                break;
            }
            digest.update(&buffer[..n]);
            target.write_all(&buffer[..n]).map_err(BundleError::io(to))?;
            self.bytes_written += n as u64;
        }
        target.set_modified(modified).map_err(BundleError::io(to))?;
        Ok(format!("{:x}", digest.finalize()))
    }

    /// A new file, never one that is there: it might be a link into the checkpoint. Messages speak of the goal: what is
    /// written now is gone when they are read.
    fn create_new(&self, name: &str) -> Result<File, BundleError> {
        let goal = self.goal.join(name);
        File::create_new(self.path(name)).map_err(|problem| match problem.kind() {
            ErrorKind::AlreadyExists => taken(&goal, name),
            _ => BundleError::io(&goal)(problem),
        })
    }

    /// Gives the finished folder its name. An old bundle of that name goes only once the new one is complete.
    pub(super) fn publish(self) -> Result<(), BundleError> {
        check_goal(&self.goal, self.replace)?;
        let old = self.temporary.path().join("replaced");
        let replaces = self.replace && self.goal.exists();
        if replaces {
            fs::rename(&self.goal, &old).map_err(BundleError::io(&self.goal))?;
        }
        let renamed = fs::rename(&self.content, &self.goal);
        if renamed.is_err() && replaces {
            fs::rename(&old, &self.goal).map_err(BundleError::io(&self.goal))?;
        }
        renamed.map_err(BundleError::io(&self.goal))
    }
}

/// Whether a bundle may take the name `goal`.
fn check_goal(goal: &Path, replace: bool) -> Result<(), BundleError> {
    if fs::symlink_metadata(goal).is_err() {
        return Ok(());
    }
    if !replace {
        return Err(BundleError::Exists { path: goal.to_owned() });
    }
    if goal.join(MANIFEST_FILE).is_file() {
        return Ok(());
    }
    Err(BundleError::invalid(goal, format!("not a bundle (no {MANIFEST_FILE}): --force replaces only bundles")))
}

fn taken(path: &Path, name: &str) -> BundleError {
    BundleError::invalid(path, format!("two files of the bundle would be called '{name}'"))
}
