//! Where the ONNX Runtime shared library comes from.
//!
//! It is loaded at run time, so that one binary works with the CPU build, a CUDA build or the user's own. The first
//! place that has one decides: `ORT_DYLIB_PATH`; the system's library folders; the active Python environment; the
//! per-user cache; and, when allowed, a fetch into that cache. A library that `ORT_DYLIB_PATH` names must work. Others
//! that do not are passed over, and the reasons are kept for whoever wants to know.

use super::dylib::Dylib;
use crate::fetch::asset::ONNXRUNTIME;
use crate::fetch::{Cache, FetchError, OnProgress};
use ort::environment::GlobalThreadPoolOptions;
use serde::{Deserialize, Serialize};
use std::ffi::{CStr, OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Name of the environment variable that names the library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// The oldest minor version of ONNX Runtime 1 whose API this program can use.
pub const OLDEST_MINOR_VERSION: u32 = ort::MINOR_VERSION;

/// Where a library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `ORT_DYLIB_PATH` names it.
    Variable,
    /// In one of the system's library folders or one of `LD_LIBRARY_PATH`.
    System,
    /// In the `onnxruntime` package of the active virtual or conda environment.
    PythonEnvironment,
    /// In the per-user cache.
    Cache,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Variable => LIBRARY_VARIABLE,
            Origin::System => "system library folder",
            Origin::PythonEnvironment => "active Python environment",
            Origin::Cache => "per-user cache",
        })
    }
}

/// A library that can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// Its path.
    pub path: PathBuf,
    /// Where it was found.
    pub origin: Origin,
    /// What it says its version is: `1.31.1`.
    pub version: String,
}

/// A library that was passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Its path.
    pub path: PathBuf,
    /// Where it was found.
    pub origin: Origin,
    /// Why it cannot be used.
    pub reason: String,
}

/// Why there is no ONNX Runtime.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The library that `ORT_DYLIB_PATH` names cannot be used.
    #[error("ORT_DYLIB_PATH={path}: {reason}", path = path.display())]
    Variable {
        /// The path given.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
    /// There is none, and fetching was not allowed.
    #[error("no ONNX Runtime found{}: run `accordion fetch onnxruntime`, or {}", passed_over(rejected), ONNXRUNTIME.instead)]
    NotFound {
        /// The libraries that were passed over.
        rejected: Vec<Rejected>,
    },
    /// There is none, and fetching it failed.
    #[error("no ONNX Runtime found{}, and it could not be fetched: {source}", passed_over(rejected))]
    Fetch {
        /// The libraries that were passed over.
        rejected: Vec<Rejected>,
        /// Why it could not be fetched.
        source: Box<FetchError>,
    },
    /// The library that was found did not start.
    #[error("{path}: {reason}", path = path.display())]
    Start {
        /// The library.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

fn passed_over(rejected: &[Rejected]) -> String {
    if rejected.is_empty() {
        return String::new();
    }
    let each: Vec<String> = rejected.iter().map(|r| format!("{}: {}", r.path.display(), r.reason)).collect();
    format!(" (passed over: {})", each.join("; "))
}

/// How to look for the library.
#[derive(Default)]
pub struct LoadOptions<'a> {
    fetch: Option<&'a mut OnProgress<'a>>,
    threads: Option<usize>,
}

impl<'a> LoadOptions<'a> {
    /// Fetch the library into the cache when there is none; progress goes to the callback. The default never uses the
    /// network.
    pub fn fetching(on_progress: &'a mut OnProgress<'a>) -> LoadOptions<'a> {
        LoadOptions { fetch: Some(on_progress), threads: None }
    }

    /// Run operators on this many threads; all cores if not given. What the first successful load asks for counts.
    #[must_use]
    pub fn with_threads(mut self, threads: Option<usize>) -> Self {
        self.threads = threads;
        self
    }
}

/// The library that the search ends at, and those it passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The library to use.
    pub library: Library,
    /// The libraries that come before it and cannot be used.
    pub rejected: Vec<Rejected>,
}

/// ONNX Runtime, loaded into this process.
#[derive(Debug)]
pub struct LoadedRuntime {
    found: Found,
    // Sessions reach the environment through a weak reference inside `ort`: this is what keeps it alive.
    environment: ort::environment::Environment,
}

impl LoadedRuntime {
    /// The library.
    pub fn library(&self) -> &Library {
        &self.found.library
    }

    /// The libraries that come before it and cannot be used.
    pub fn rejected(&self) -> &[Rejected] {
        &self.found.rejected
    }

    /// The one environment of this process.
    pub fn environment(&self) -> &ort::environment::Environment {
        &self.environment
    }

    /// Names of the execution providers this build has, best first: `CUDAExecutionProvider`, `CPUExecutionProvider`.
    /// That a provider is built in does not say that its libraries or a device are there.
    pub fn execution_providers(&self) -> Vec<String> {
        let api = ort::api();
        let (mut names, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: both are valid places for the call's results.
        let status = unsafe { (api.GetAvailableProviders)(&raw mut names, &raw mut count) };
        if !status.0.is_null() || names.is_null() {
            return Vec::new();
        }
        let providers = (0..usize::try_from(count).unwrap_or(0))
            // SAFETY: the call filled `names` with `count` C strings, which live until they are released below.
            .map(|i| unsafe { CStr::from_ptr(*names.add(i)) }.to_string_lossy().into_owned())
            .collect();
        // SAFETY: exactly what the call above returned, released once; a failure to release could only leak.
        let _ = unsafe { (api.ReleaseAvailableProviders)(names, count) };
        providers
    }
}

/// Loads ONNX Runtime into this process, once: later calls, from any thread, return the same. It must come before any
/// other use of `ort`. A call that fails can be repeated.
///
/// # Errors
///
/// There is no usable library, or it does not start.
pub fn load(options: LoadOptions<'_>) -> Result<&'static LoadedRuntime, RuntimeError> {
    static LOADED: OnceLock<LoadedRuntime> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    if let Some(loaded) = LOADED.get() {
        return Ok(loaded);
    }
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = LOADED.get() {
        return Ok(loaded);
    }
    let threads = options.threads.unwrap_or(0);
    let loaded = start(find(options)?, threads)?;
    Ok(LOADED.get_or_init(|| loaded))
}

/// Looks for the library without loading it for use.
///
/// # Errors
///
/// There is no usable library.
pub fn find(options: LoadOptions<'_>) -> Result<Found, RuntimeError> {
    search(&Places::of(|name| std::env::var_os(name)), Cache::from_environment(), options)
}

/// Starts the library. All sessions share its threads (0: one per core): graphs of one method run one after the other, and
/// none should keep spinning threads for itself.
fn start(found: Found, threads: usize) -> Result<LoadedRuntime, RuntimeError> {
    let path = &found.library.path;
    let failed = |reason: String| RuntimeError::Start { path: path.clone(), reason };
    let builder = ort::init_from(path).map_err(|e| failed(e.to_string()))?.with_name("accordion").with_telemetry(false);
    let pool = GlobalThreadPoolOptions::default().with_intra_threads(threads).map_err(|e| failed(e.to_string()))?;
    let environment = builder.with_global_thread_pool(pool).build().map_err(|e| failed(e.to_string()))?;
    keep_freed_memory();
    Ok(LoadedRuntime { found, environment })
}

/// Tells the system's allocator to keep what is freed for the next use. By default it returns large blocks to the system
/// at once, and every tensor of every call would be made of fresh pages.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest value that the library accepts: larger blocks, caches of whole nodes, come and go by themselves.
        const MAP_BLOCKS_FROM: libc::c_int = 32 << 20;
        const KEEP_FREE: libc::c_int = 512 << 20;
        // SAFETY: both parameters may be set at any time; a refusal changes nothing and costs only speed.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAP_BLOCKS_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP_FREE);
        }
    }
}

/// Where to look before the cache.
#[derive(Debug, Default, PartialEq, Eq)]
struct Places {
    variable: Option<PathBuf>,
    folders: Vec<(Origin, PathBuf)>,
}

impl Places {
    fn of(variable: impl Fn(&str) -> Option<OsString>) -> Places {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let mut folders: Vec<_> = library_folders(set).into_iter().map(|folder| (Origin::System, folder)).collect();
        for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set) {
            for packages in site_packages(Path::new(&prefix)) {
                folders.push((Origin::PythonEnvironment, packages.join("onnxruntime/capi")));
            }
        }
        Places { variable: set(LIBRARY_VARIABLE).map(PathBuf::from), folders }
    }
}

/// The folders the dynamic linker usually looks into, those of its variable first.
pub(crate) fn library_folders(variable: impl Fn(&'static str) -> Option<OsString>) -> Vec<PathBuf> {
    let (path_variable, standard): (_, &[&str]) = if cfg!(target_os = "macos") {
        ("DYLD_LIBRARY_PATH", &["/opt/homebrew/lib", "/usr/local/lib"])
    } else {
        ("LD_LIBRARY_PATH", &["/usr/local/lib", "/usr/local/lib64", "/usr/lib64", "/usr/lib", "/lib64", "/lib"])
    };
    let mut folders: Vec<PathBuf> = variable(path_variable).iter().flat_map(std::env::split_paths).collect();
    if cfg!(target_os = "linux") {
        folders.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH).into());
    }
    folders.extend(standard.iter().map(PathBuf::from));
    folders.retain(|folder| folder.is_absolute());
    folders
}

/// The package folders of the Python environment at `prefix`.
pub(crate) fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let versions = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = versions
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join("site-packages"))
        .filter(|folder| folder.is_dir())
        .collect();
    folders.sort();
    folders
}

fn search(places: &Places, cache: Result<Cache, FetchError>, options: LoadOptions<'_>) -> Result<Found, RuntimeError> {
    if let Some(path) = &places.variable {
        let failed = |reason| RuntimeError::Variable { path: path.clone(), reason };
        // `ort` would take a relative path from the folder of the executable.
        let absolute = std::path::absolute(path).map_err(|e| failed(e.to_string()))?;
        let version = probe(&absolute).map_err(failed)?;
        let library = Library { path: absolute, origin: Origin::Variable, version };
        return Ok(Found { library, rejected: Vec::new() });
    }
    let cached = cache.as_ref().ok().and_then(|cache| cache.get(&ONNXRUNTIME).ok().flatten());
    let candidates = places
        .folders
        .iter()
        .flat_map(|(origin, folder)| libraries_in(folder).into_iter().map(|path| (*origin, path)))
        .chain(cached.iter().map(|fetched| (Origin::Cache, fetched.path().to_owned())));
    let mut rejected: Vec<Rejected> = Vec::new();
    for (origin, path) in candidates {
        // The same folder often has several names (/lib and /usr/lib).
        if rejected.iter().any(|r| same_file(&r.path, &path)) {
            continue;
        }
        match probe(&path) {
            Ok(version) => return Ok(Found { library: Library { path, origin, version }, rejected }),
            Err(reason) => rejected.push(Rejected { path, origin, reason }),
        }
    }
    let Some(on_progress) = options.fetch.filter(|_| cached.is_none()) else {
        return Err(RuntimeError::NotFound { rejected });
    };
    let fetched = match cache.and_then(|cache| cache.fetch(&ONNXRUNTIME, on_progress)) {
        Ok(fetched) => fetched,
        Err(source) => return Err(RuntimeError::Fetch { rejected, source: Box::new(source) }),
    };
    let path = fetched.path().to_owned();
    match probe(&path) {
        Ok(version) => Ok(Found { library: Library { path, origin: Origin::Cache, version }, rejected }),
        Err(reason) => Err(RuntimeError::Start { path, reason }),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// The files of a folder that are named like the library: the unversioned name first, then the highest version.
fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut libraries: Vec<(Vec<u32>, PathBuf)> =
        entries.filter_map(|entry| Some((version_in_name(&entry.file_name())?, entry.path()))).collect();
    libraries.sort_by(|(a, _), (b, _)| (!a.is_empty()).cmp(&!b.is_empty()).then_with(|| b.cmp(a)));
    libraries.into_iter().map(|(_, path)| path).collect()
}

/// The numbers in `libonnxruntime.so.1.31.1` or `libonnxruntime.1.31.1.dylib`; `None` for other files.
fn version_in_name(name: &OsStr) -> Option<Vec<u32>> {
    let rest = name.to_str()?.strip_prefix("libonnxruntime.")?;
    let version = match rest.strip_prefix("so") {
        Some(version) => version.strip_prefix('.').unwrap_or(version),
        None => rest.strip_suffix("dylib")?.trim_end_matches('.'),
    };
    version.split('.').filter(|part| !part.is_empty()).map(|part| part.parse().ok()).collect()
}

/// The version of the library at `path`, if this program can use it; otherwise why not.
fn probe(path: &Path) -> Result<String, String> {
    if !path.is_file() {
        return Err("there is no such file".to_owned());
    }
    let library = Dylib::open(path)?;
    let symbol = library.symbol(c"OrtGetApiBase").ok_or("it is not ONNX Runtime: it has no OrtGetApiBase")?;
    // SAFETY: in every ONNX Runtime that exports it, this symbol is a function without parameters that returns a pointer
    // to a static structure; both stay valid while `library` is open.
    let base = unsafe {
        let get_base: unsafe extern "C" fn() -> *const ort::sys::OrtApiBase = std::mem::transmute(symbol.as_ptr());
        get_base().as_ref()
    };
    let base = base.ok_or("OrtGetApiBase returned nothing")?;
    // SAFETY: `base` is the library's own structure, whose first two members have never changed; the string is static.
    let version = unsafe { CStr::from_ptr((base.GetVersionString)()) }.to_string_lossy().into_owned();
    check_version(&version)?;
    // SAFETY: as above; the call only looks a table up.
    if unsafe { (base.GetApi)(ort::sys::ORT_API_VERSION) }.is_null() {
        return Err(format!("version {version} has no API version {}", ort::sys::ORT_API_VERSION));
    }
    Ok(version)
}

fn check_version(version: &str) -> Result<(), String> {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(1)), Some(Ok(minor))) if minor >= OLDEST_MINOR_VERSION => Ok(()),
        _ => Err(format!("it is version {version}, expected 1.{OLDEST_MINOR_VERSION} or later")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::fetch::Progress;
    use std::fs;

    fn no_cache() -> Result<Cache, FetchError> {
        Err(FetchError::NoCacheFolder)
    }

    #[test]
    fn loads_once_from_any_thread() {
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let load = || load(LoadOptions::fetching(&mut |_: Progress| {})).unwrap();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(loaded.iter().all(|other| std::ptr::eq(*other, loaded[0])));
        assert!(loaded[0].library().path.is_file());
        check_version(&loaded[0].library().version).unwrap();
        assert!(loaded[0].execution_providers().contains(&"CPUExecutionProvider".to_owned()));
        assert!(!ort::info().is_empty());
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        for good in [format!("1.{OLDEST_MINOR_VERSION}.0"), "1.100.0".to_owned()] {
            check_version(&good).unwrap();
        }
        for bad in ["1.23.2", "1.9.0", "2.0.0", "1", "", "one.two"] {
            let reason = check_version(bad).unwrap_err();
            assert_eq!(reason, format!("it is version {bad}, expected 1.{OLDEST_MINOR_VERSION} or later"));
        }
    }

    #[test]
    fn the_named_library_must_work_even_where_others_would() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so");
        fs::write(&path, "no library").unwrap();
        let places = Places { variable: Some(path.clone()), folders: Vec::new() };
        let error = search(&places, no_cache(), LoadOptions::default()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("ORT_DYLIB_PATH={}: ", path.display())), "{error}");

        let places = Places { variable: Some(folder.path().join("absent.so")), folders: Vec::new() };
        let error = search(&places, no_cache(), LoadOptions::default()).unwrap_err().to_string();
        assert!(error.ends_with("absent.so: there is no such file"), "{error}");
    }

    #[test]
    fn unusable_libraries_are_passed_over_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so.1.31.1");
        fs::write(&path, "no library").unwrap();
        // The same file under a second name is not reported twice.
        std::os::unix::fs::symlink(&path, folder.path().join("libonnxruntime.so")).unwrap();
        let places = Places { variable: None, folders: vec![(Origin::System, folder.path().to_owned())] };
        let error = search(&places, no_cache(), LoadOptions::default()).unwrap_err();
        let RuntimeError::NotFound { rejected } = &error else { panic!("{error}") };
        assert_eq!(rejected.len(), 1);
        assert_eq!(rejected[0].path, folder.path().join("libonnxruntime.so"));
        let message = error.to_string();
        assert!(message.contains("ORT_DYLIB_PATH") && message.contains("libonnxruntime.so: "), "{message}");
    }

    #[test]
    fn without_a_cache_folder_the_fetch_says_so() {
        let error = search(&Places::default(), no_cache(), LoadOptions::fetching(&mut |_| {})).unwrap_err();
        assert!(error.to_string().contains("ACCORDION_CACHE"), "{error}");
    }

    #[test]
    fn places_come_from_the_variables() {
        let venv = tempfile::tempdir().unwrap();
        let packages = venv.path().join("lib/python3.12/site-packages");
        fs::create_dir_all(&packages).unwrap();
        let places = Places::of(|name| match name {
            "ORT_DYLIB_PATH" => Some("".into()),
            "LD_LIBRARY_PATH" | "DYLD_LIBRARY_PATH" => Some("/first:relative:/second".into()),
            "VIRTUAL_ENV" => Some(venv.path().into()),
            _ => None,
        });
        assert_eq!(places.variable, None);
        assert_eq!(places.folders[0], (Origin::System, "/first".into()));
        assert_eq!(places.folders[1], (Origin::System, "/second".into()));
        assert_eq!(*places.folders.last().unwrap(), (Origin::PythonEnvironment, packages.join("onnxruntime/capi")));
    }

    #[test]
    fn the_unversioned_name_then_the_highest_version() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.31.1",
            "libonnxruntime.so",
            "libonnxruntime_providers_shared.so",
            "libonnxruntime.so.backup",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let names: Vec<_> = libraries_in(folder.path()).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["libonnxruntime.so", "libonnxruntime.so.1.31.1", "libonnxruntime.so.1.9.0"]);
        assert_eq!(version_in_name("libonnxruntime.1.31.1.dylib".as_ref()), Some(vec![1, 31, 1]));
        assert_eq!(version_in_name("libonnxruntime.dylib".as_ref()), Some(vec![]));
    }
}
