//! A folder in the making: written beside its goal, it takes the goal's name when it is complete.
//!
//! ```text
//! <parent>/.accordion-export-XXXXXX/content/    being written
//!                                   replaced/   the old folder, while the new one takes its place
//!          <goal>/                              after the rename
//! ```
//!
//! A killed command leaves at most the folder that begins with a dot.

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Why a folder cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StagingError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The folder is already there.
    #[error("{} exists already; choose another folder, or --force to replace it", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// What is there is not what may be replaced.
    #[error("{}: not a {noun} (no {marker}): --force replaces only {noun}s", path.display())]
    NotReplaceable {
        /// The folder.
        path: PathBuf,
        /// What may be replaced.
        noun: &'static str,
        /// The file that such a folder has.
        marker: &'static str,
    },
    /// The disk has too little room.
    #[error("{}: {needed} bytes are to be written there, and {available} are free", path.display())]
    NoRoom {
        /// The folder.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Two files would have the same name.
    #[error("{}: two files of the folder would be called '{name}'", path.display())]
    Taken {
        /// The second one.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

/// What kind of folder is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// What messages call it.
    pub(crate) noun: &'static str,
    /// The file that every finished folder of the kind has, and others do not: only such folders are replaced.
    pub(crate) marker: &'static str,
    /// How the names of unfinished folders begin.
    pub(crate) prefix: &'static str,
}

/// How a file gets into the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// As a hard link, or as a copy where the file system cannot link.
    #[default]
    Link,
    /// As a copy.
    Copy,
}

/// Dropped before [`Staging::publish`], it leaves nothing behind.
pub(crate) struct Staging {
    temporary: TempDir,
    content: PathBuf,
    goal: PathBuf,
    kind: Kind,
    replace: bool,
    bytes_written: u64,
    link_failure: Option<String>,
}

impl Staging {
    /// Starts a folder that will become `goal`, which must not exist or, with `replace`, be a folder of its kind.
    pub(crate) fn create(goal: &Path, kind: Kind, replace: bool) -> Result<Self, StagingError> {
        check_goal(goal, kind, replace)?;
        let parent = goal.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::Builder::new().prefix(kind.prefix).tempdir_in(parent).map_err(io_error(parent))?;
        // A folder of its own inside: temporary folders are private to the user, what becomes of this one need not be.
        let content = temporary.path().join("content");
        fs::create_dir(&content).map_err(io_error(&content))?;
        Ok(Self { temporary, content, goal: goal.to_owned(), kind, replace, bytes_written: 0, link_failure: None })
    }

    /// Where the file called `name` is for now.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.content.join(name)
    }

    /// Bytes written so far; links have none.
    pub(crate) fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// The first file that had to be copied because it could not be linked, and why.
    pub(crate) fn link_failure(&self) -> Option<&str> {
        self.link_failure.as_deref()
    }

    /// Refuses to begin what the disk has no room for. Where the system does not say how much there is, writing finds out.
    pub(crate) fn check_room(&self, needed: u64) -> Result<(), StagingError> {
        match free_bytes(&self.content) {
            Some(available) if available < needed => {
                Err(StagingError::NoRoom { path: self.goal.clone(), needed, available })
            }
            _ => Ok(()),
        }
    }

    /// Writes a new file by way of `write`, which leaves the file's position at the end of what it wrote.
    pub(crate) fn write_with(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), StagingError> {
        let mut file = self.create_new(name)?;
        let written = write(&mut file).and_then(|()| file.stream_position());
        self.bytes_written += written.map_err(io_error(&self.goal.join(name)))?;
        Ok(())
    }

    /// Writes a new file.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), StagingError> {
        self.write_with(name, |file| file.write_all(bytes))
    }

    /// Gives the file `name` the time of the last change of `from`, so that the same command gives the same folder.
    pub(crate) fn date_like(&self, name: &str, from: &Path) -> Result<(), StagingError> {
        let modified = fs::metadata(from).and_then(|meta| meta.modified()).map_err(io_error(from))?;
        let file = File::options().write(true).open(self.path(name));
        file.and_then(|file| file.set_modified(modified)).map_err(io_error(&self.goal.join(name)))
    }

    /// Writes a new JSON file.
    pub(crate) fn write_json(&mut self, name: &str, value: &Value) -> Result<(), StagingError> {
        self.write(name, format!("{value:#}\n").as_bytes())
    }

    /// Puts the file `from` into the folder as `name`: a hard link if it may be one and can be, else a copy that keeps
    /// the modification time. Returns the SHA-256 of what was copied.
    pub(crate) fn place(
        &mut self,
        from: &Path,
        name: &str,
        placement: Placement,
    ) -> Result<Option<String>, StagingError> {
        // A link to a symbolic link would dangle where the folder lies: link what it points to.
        let from = fs::canonicalize(from).map_err(io_error(from))?;
        if placement == Placement::Link {
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

    fn copy(&mut self, from: &Path, name: &str) -> Result<String, StagingError> {
        const BUFFER: usize = 1 << 20;
        let mut source = File::open(from).map_err(io_error(from))?;
        let modified = source.metadata().and_then(|meta| meta.modified()).map_err(io_error(from))?;
        let mut target = self.create_new(name)?;
        let to = &self.goal.join(name);
        let mut digest = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = source.read(&mut buffer).map_err(io_error(from))?;
            if n == 0 {
                break;
            }
            digest.update(&buffer[..n]);
            target.write_all(&buffer[..n]).map_err(io_error(to))?;
            self.bytes_written += n as u64;
        }
        target.set_modified(modified).map_err(io_error(to))?;
        Ok(format!("{:x}", digest.finalize()))
    }

    /// A new file, never one that is there: it might be a link into a checkpoint. Messages speak of the goal: what is
    /// written now is gone when they are read.
    fn create_new(&self, name: &str) -> Result<File, StagingError> {
        let goal = self.goal.join(name);
        File::create_new(self.path(name)).map_err(|problem| match problem.kind() {
            ErrorKind::AlreadyExists => taken(&goal, name),
            _ => io_error(&goal)(problem),
        })
    }

    /// Gives the finished folder its name. An old folder of that name goes only once the new one is complete.
    pub(crate) fn publish(self) -> Result<(), StagingError> {
        check_goal(&self.goal, self.kind, self.replace)?;
        let old = self.temporary.path().join("replaced");
        let replaces = self.replace && self.goal.exists();
        if replaces {
            fs::rename(&self.goal, &old).map_err(io_error(&self.goal))?;
        }
        let renamed = fs::rename(&self.content, &self.goal);
        if renamed.is_err() && replaces {
            fs::rename(&old, &self.goal).map_err(io_error(&self.goal))?;
        }
        renamed.map_err(io_error(&self.goal))
    }
}

/// Whether a folder of the kind may take the name `goal`.
fn check_goal(goal: &Path, kind: Kind, replace: bool) -> Result<(), StagingError> {
    if fs::symlink_metadata(goal).is_err() {
        return Ok(());
    }
    if !replace {
        return Err(StagingError::Exists { path: goal.to_owned() });
    }
    let Kind { noun, marker, .. } = kind;
    if goal.join(marker).is_file() {
        return Ok(());
    }
    Err(StagingError::NotReplaceable { path: goal.to_owned(), noun, marker })
}

/// Bytes that this user may still write into the file system of `path`.
#[cfg(unix)]
fn free_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: the structure is integers, for which zeros are a value; the call reads a string that ends with 0 and only
    // writes into the structure.
    let found = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut found) == 0).then_some(found)
    }?;
    // Their widths differ between systems.
    #[allow(clippy::unnecessary_cast)]
    let [blocks, size] = [found.f_bavail as u64, found.f_frsize as u64];
    blocks.checked_mul(size)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

fn taken(path: &Path, name: &str) -> StagingError {
    StagingError::Taken { path: path.to_owned(), name: name.to_owned() }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> StagingError + '_ {
    move |source| StagingError::Io { path: path.to_owned(), source }
}
