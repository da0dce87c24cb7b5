//! Where this program runs and what it found there: for `accordion doctor`, and for the block of every report that says
//! on what its numbers were measured. Nothing here needs a network, and what is not there is a fact, not an error.

mod machine;
mod memory;
mod nvidia;

pub use machine::Machine;
pub use memory::{current_resident_bytes, peak_resident_bytes, reset_peak_resident};
pub use nvidia::{Device, Nvidia, TensorRtLibrary, driver_library};

use crate::fetch::asset::{self, Registry};
use crate::fetch::{Cache, client_version};
use crate::runtime::locate::{self, LoadOptions, Origin, Rejected};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What a measurement depends on besides the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of this program.
    pub accordion: String,
    /// The computer.
    pub machine: Machine,
    /// The runtime.
    pub onnxruntime: OnnxRuntime,
    /// The GPUs.
    pub nvidia: Nvidia,
}

/// Everything `accordion doctor` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// What measurements depend on.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The `TensorRT` libraries there are.
    pub tensorrt: Vec<TensorRtLibrary>,
    /// The cache; `None` where no folder for it is known.
    pub cache: Option<CacheContent>,
    /// The package clients that fetch what is missing.
    pub clients: Clients,
}

/// ONNX Runtime as this process uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "status")]
pub enum OnnxRuntime {
    /// There is none that can be used.
    Absent {
        /// Why, and what to do.
        reason: String,
    },
    /// It is loaded.
    Present {
        /// Its version.
        version: String,
        /// Its library.
        path: PathBuf,
        /// Where the library was found.
        origin: Origin,
        /// The execution providers it was built with, best first.
        execution_providers: Vec<String>,
        /// Libraries that come first in the search and cannot be used.
        rejected: Vec<Rejected>,
    },
}

/// The cache folder and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheContent {
    /// The folder.
    pub folder: PathBuf,
    /// Every asset there is, fetched or not.
    pub assets: Vec<AssetState>,
}

/// An asset and whether it is in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssetState {
    /// Name to fetch it by.
    pub name: String,
    /// What it is.
    pub title: String,
    /// Licence of the content.
    pub licence: String,
    /// Registry, package and version; empty where it is not published for this machine.
    pub source: String,
    /// Bytes of its files in the cache; `None` if it is not there.
    pub cached_bytes: Option<u64>,
}

/// The programs that fetch packages, as they name themselves; `None` is not installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clients {
    /// `Python 3.12.1`.
    pub python: Option<String>,
    /// `pip 24.0 from ... (python 3.12)`.
    pub pip: Option<String>,
    /// `10.2.4`.
    pub npm: Option<String>,
}

impl Provenance {
    /// Looks around. Loads ONNX Runtime into this process if that has not happened and one is there; does not fetch it.
    pub fn probe() -> Provenance {
        Provenance {
            accordion: env!("CARGO_PKG_VERSION").to_owned(),
            machine: Machine::probe(),
            onnxruntime: OnnxRuntime::probe(),
            nvidia: Nvidia::probe(),
        }
    }

    /// The same as names and values, for the block of a report that says where its numbers come from.
    pub fn pairs(&self) -> Vec<(String, String)> {
        let machine = &self.machine;
        let mut pairs = vec![
            ("accordion", self.accordion.clone()),
            ("System", machine.os.clone()),
            ("Processor", format!("{} {}, {} cores", machine.arch, machine.cpu, machine.cores)),
            ("Vector extensions", machine.simd.join(" ")),
        ];
        pairs.extend(machine.memory_bytes.map(|bytes| ("Memory", format!("{:.1} GB", bytes as f64 / 1e9))));
        if let OnnxRuntime::Present { version, .. } = &self.onnxruntime {
            pairs.push(("ONNX Runtime", version.clone()));
        }
        if let Nvidia::Present { devices, .. } = &self.nvidia {
            pairs.extend(devices.iter().map(|device| ("GPU", device.name.clone())));
        }
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

impl Environment {
    /// Looks around, and runs the package clients to ask for their versions.
    pub fn probe() -> Environment {
        Environment {
            provenance: Provenance::probe(),
            tensorrt: nvidia::tensorrt_libraries(&python_packages()),
            cache: Cache::from_environment().ok().map(|cache| CacheContent::of(&cache)),
            clients: Clients {
                python: python(&["--version"]).and_then(|mut lines| lines.pop()),
                pip: client_version(Registry::Pypi).map(|(_, version)| version),
                npm: client_version(Registry::Npm).map(|(_, version)| version),
            },
        }
    }
}

impl OnnxRuntime {
    fn probe() -> OnnxRuntime {
        match locate::load(LoadOptions::default()) {
            Err(error) => OnnxRuntime::Absent { reason: error.to_string() },
            Ok(loaded) => OnnxRuntime::Present {
                version: loaded.library().version.clone(),
                path: loaded.library().path.clone(),
                origin: loaded.library().origin,
                execution_providers: loaded.execution_providers(),
                rejected: loaded.rejected().to_vec(),
            },
        }
    }
}

impl CacheContent {
    fn of(cache: &Cache) -> CacheContent {
        let state = |asset: &&'static asset::Asset| AssetState {
            name: asset.name.to_owned(),
            title: asset.title.to_owned(),
            licence: asset.licence.to_owned(),
            source: asset.package().map(asset::Package::source).unwrap_or_default(),
            cached_bytes: cache
                .get(asset)
                .ok()
                .flatten()
                .map(|fetched| fetched.files().iter().filter_map(|file| Some(file.metadata().ok()?.len())).sum()),
        };
        CacheContent { folder: cache.folder().to_owned(), assets: asset::ALL.iter().map(state).collect() }
    }
}

/// The package folders of the Python that answers to `python3`: the active environment's, then the user's.
pub(crate) fn python_packages() -> Vec<PathBuf> {
    let code = "import site, sysconfig; print(sysconfig.get_path('purelib')); print(site.getusersitepackages())";
    python(&["-I", "-c", code]).unwrap_or_default().into_iter().map(PathBuf::from).collect()
}

/// The lines that `python3` prints with these arguments; `None` if there is none or it fails.
fn python(arguments: &[&str]) -> Option<Vec<String>> {
    let output = Command::new("python3").args(arguments).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_facts_survive_json() {
        let environment = Environment::probe();
        let json = serde_json::to_string(&environment).unwrap();
        assert_eq!(serde_json::from_str::<Environment>(&json).unwrap(), environment);
    }

    #[test]
    fn the_cache_lists_every_asset() {
        let folder = tempfile::tempdir().unwrap();
        let content = CacheContent::of(&Cache::at(folder.path()));
        assert_eq!(content.assets.len(), asset::ALL.len());
        assert!(content.assets.iter().all(|asset| asset.cached_bytes.is_none()));
        let text = content.assets.iter().find(|asset| asset.name == "demo-text").unwrap();
        assert_eq!((text.licence.as_str(), text.source.as_str()), ("public domain", "PyPI guidellm 0.3.1"));
    }
}
