//! The C shim, open and ready to be called.

use super::compile::compiled;
use super::ranges::{Extent, InputRange};
use super::toolkit::Toolkit;
use super::{TensorRtError, sys};
use crate::fetch::Cache;
use crate::runtime::dylib::Dylib;
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{NonNull, null, null_mut};

/// Room for a message from the shim.
const MESSAGE_BYTES: usize = 16 << 10;

/// A version as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// What hears of a build; called from the builder's own threads.
pub trait Observer: Sync {
    /// A message of the library. Severity 0 and 1 are errors, 2 warnings, 3 information, 4 details.
    fn log(&self, severity: i32, message: &str);
    /// Step `step` of `steps` of a phase is done; `false` stops the build.
    fn progress(&self, phase: &str, step: usize, steps: usize) -> bool;
}

/// What is built.
pub struct Request<'a> {
    /// The graph, for messages.
    pub graph: &'a str,
    /// The ONNX model.
    pub model: &'a [u8],
    /// Where the model lies, or would: its weights are found from there.
    pub model_path: &'a Path,
    /// One list of ranges per optimization profile.
    pub profiles: &'a [Vec<InputRange>],
    /// Timings of an earlier build.
    pub timing_cache: &'a [u8],
    /// Most device memory a layer may take while it runs, in bytes; 0 leaves it to the library.
    pub workspace_bytes: usize,
    /// Whether products of fp32 may be rounded to TF32.
    pub allow_tf32: bool,
}

/// What a build gives.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The engine, serialised.
    pub plan: Vec<u8>,
    /// What was measured; empty where the flavour measures nothing.
    pub timing_cache: Vec<u8>,
}

/// NVIDIA's library and parser in this process, behind the shim. They stay loaded when this is dropped.
pub struct Shim {
    toolkit: Toolkit,
    library: Dylib,
    opened: NonNull<sys::TensorRt>,
    version: Version,
}

impl Shim {
    /// Compiles the shim if that has not been done, and opens the libraries.
    ///
    /// # Errors
    ///
    /// There is no compiler, the headers do not fit the shim, or the libraries do not fit the headers.
    pub fn open(toolkit: &Toolkit) -> Result<Self, TensorRtError> {
        Self::open_compiled(toolkit, &compiled(toolkit, Cache::from_environment()?.folder())?)
    }

    /// The same with the shim `path`, which has been compiled.
    ///
    /// # Errors
    ///
    /// It is not the shim, or the libraries do not fit it.
    pub fn open_compiled(toolkit: &Toolkit, path: &Path) -> Result<Self, TensorRtError> {
        let library = Dylib::open(path).map_err(|reason| TensorRtError::Library { path: path.to_owned(), reason })?;
        let open: sys::Open = function(&library, path, c"accordion_tensorrt_open")?;
        let versions: sys::Versions = function(&library, path, c"accordion_tensorrt_versions")?;
        let (infer, parser) = (c_path(&toolkit.library)?, c_path(&toolkit.parser)?);
        let mut opened = null_mut();
        // SAFETY: the strings and the places of results live over the call.
        let status =
            message(|text, size| unsafe { open(infer.as_ptr(), parser.as_ptr(), &raw mut opened, text, size) });
        let refused = |reason| TensorRtError::Library { path: toolkit.library.clone(), reason };
        status.map_err(refused)?;
        let opened = NonNull::new(opened).ok_or_else(|| refused("no reason given".to_owned()))?;
        let (mut headers, mut found) = (0, 0);
        // SAFETY: `opened` is open, and the results are integers.
        unsafe { versions(opened.as_ptr(), &raw mut headers, &raw mut found) };
        Ok(Self { toolkit: toolkit.clone(), library, opened, version: Version(found) })
    }

    /// The version of the library.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Registers the plugins in the library `path`.
    ///
    /// # Errors
    ///
    /// The registry refuses it.
    pub fn load_plugins(&self, path: &Path) -> Result<(), TensorRtError> {
        let load: sys::LoadPlugins = self.function(c"accordion_tensorrt_load_plugins")?;
        let name = c_path(path)?;
        // SAFETY: the libraries are open, and the string lives over the call.
        message(|text, size| unsafe { load(self.opened.as_ptr(), name.as_ptr(), text, size) })
            .map_err(|reason| TensorRtError::Library { path: path.to_owned(), reason })
    }

    /// Parses and builds. `TensorRT` needs a device for it.
    ///
    /// # Errors
    ///
    /// The library refuses the graph or its ranges, and says why.
    pub fn build(&self, request: &Request<'_>, observer: &dyn Observer) -> Result<Plan, TensorRtError> {
        let refused = |message| TensorRtError::Graph { graph: request.graph.to_owned(), message };
        let build: sys::Build = self.function(c"accordion_tensorrt_build")?;
        let model_path = c_path(request.model_path)?;
        let owned: Option<Vec<CProfile>> = request.profiles.iter().map(|inputs| CProfile::new(inputs)).collect();
        let owned = owned.ok_or_else(|| refused("a range does not fit into 64 bits".to_owned()))?;
        let profiles: Vec<sys::Profile> = owned.iter().map(CProfile::as_sys).collect();
        let c_request = sys::Request {
            model: request.model.as_ptr().cast(),
            model_bytes: request.model.len(),
            model_path: model_path.as_ptr(),
            profiles: profiles.as_ptr(),
            num_profiles: profiles.len(),
            timing_cache: if request.timing_cache.is_empty() { null() } else { request.timing_cache.as_ptr().cast() },
            timing_cache_bytes: request.timing_cache.len(),
            workspace_bytes: request.workspace_bytes,
            allow_tf32: request.allow_tf32.into(),
        };
        let [mut plan, mut timing_cache] = [(); 2].map(|()| sys::Bytes { data: null_mut(), size: 0 });
        // SAFETY: what the request points to, the observer and the places of results live over the call, which keeps none
        // of it.
        let status = message(|text, size| unsafe {
            let (plan, cache) = (&raw mut plan, &raw mut timing_cache);
            build(self.opened.as_ptr(), &raw const c_request, c_observer(&observer), plan, cache, text, size)
        });
        let plan = self.taken(plan)?;
        let timing_cache = self.taken(timing_cache)?;
        status.map_err(refused)?;
        Ok(Plan { plan, timing_cache })
    }

    /// The toolkit that it is of.
    pub(super) fn toolkit(&self) -> &Toolkit {
        &self.toolkit
    }

    pub(super) fn as_ptr(&self) -> *mut sys::TensorRt {
        self.opened.as_ptr()
    }

    /// A function of the shim, whose type is the one in `sys`.
    pub(super) fn function<F: Copy>(&self, name: &CStr) -> Result<F, TensorRtError> {
        function(&self.library, &self.toolkit.library, name)
    }

    /// Copies what the shim allocated, and frees it.
    pub(super) fn taken(&self, bytes: sys::Bytes) -> Result<Vec<u8>, TensorRtError> {
        let free: sys::Free = self.function(c"accordion_tensorrt_free")?;
        let copy = if bytes.data.is_null() {
            Vec::new()
        } else {
            // SAFETY: the shim says so many bytes are there.
            unsafe { std::slice::from_raw_parts(bytes.data.cast::<u8>(), bytes.size) }.to_vec()
        };
        // SAFETY: allocated by the shim or null, and freed once.
        unsafe { free(bytes) };
        Ok(copy)
    }
}

// SAFETY: what is opened is a table of functions that nothing changes, and NVIDIA's may be called from any thread.
unsafe impl Send for Shim {}
// SAFETY: as above.
unsafe impl Sync for Shim {}

impl Drop for Shim {
    fn drop(&mut self) {
        if let Ok(close) = self.function::<sys::Close>(c"accordion_tensorrt_close") {
            // SAFETY: opened once and closed once.
            unsafe { close(self.opened.as_ptr()) };
        }
    }
}

/// A profile as C wants it, with the memory that its structures point into.
struct CProfile {
    names: Vec<CString>,
    numbers: Vec<[Vec<i64>; 3]>,
    shapes: Vec<sys::Range>,
    values: Vec<sys::Range>,
}

impl CProfile {
    fn new(inputs: &[InputRange]) -> Option<Self> {
        let mut profile = Self { names: Vec::new(), numbers: Vec::new(), shapes: Vec::new(), values: Vec::new() };
        for input in inputs {
            let name = CString::new(input.name.as_str()).ok()?;
            let shape = input.shape.as_slice();
            for (extents, is_value) in [(Some(shape), false), (input.value.as_ref().map(std::slice::from_ref), true)] {
                let Some(extents) = extents else { continue };
                let numbers = [0, 1, 2].map(|which| {
                    let of = |e: &Extent| i64::try_from([e.min, e.opt, e.max][which]).ok();
                    extents.iter().map(of).collect::<Option<Vec<i64>>>()
                });
                let [Some(min), Some(opt), Some(max)] = numbers else { return None };
                let numbers = [min, opt, max];
                let [min, opt, max] = numbers.each_ref().map(Vec::as_ptr);
                let range = sys::Range { name: name.as_ptr(), count: extents.len() as i32, min, opt, max };
                let ranges = if is_value { &mut profile.values } else { &mut profile.shapes };
                ranges.push(range);
                profile.numbers.push(numbers);
            }
            profile.names.push(name);
        }
        Some(profile)
    }

    fn as_sys(&self) -> sys::Profile {
        sys::Profile {
            shapes: self.shapes.as_ptr(),
            num_shapes: self.shapes.len(),
            values: self.values.as_ptr(),
            num_values: self.values.len(),
        }
    }
}

/// `observer` for C; it is a reference to a reference, because one to a trait object does not fit into a pointer.
pub(super) fn c_observer(observer: &&dyn Observer) -> sys::Observer {
    let user = std::ptr::from_ref(observer).cast_mut().cast();
    sys::Observer { user, log: Some(on_log), progress: Some(on_progress) }
}

unsafe extern "C" fn on_log(user: *mut c_void, severity: i32, text: *const c_char) {
    // SAFETY: the shim hands back the pointer of `c_observer`, and a C string.
    let (observer, text) = unsafe { (&*user.cast::<&dyn Observer>(), CStr::from_ptr(text)) };
    observer.log(severity, &text.to_string_lossy());
}

unsafe extern "C" fn on_progress(user: *mut c_void, phase: *const c_char, step: i32, steps: i32) -> i32 {
    // SAFETY: as above.
    let (observer, phase) = unsafe { (&*user.cast::<&dyn Observer>(), CStr::from_ptr(phase)) };
    let [step, steps] = [step, steps].map(|n| usize::try_from(n).unwrap_or_default());
    observer.progress(&phase.to_string_lossy(), step, steps).into()
}

/// Calls a function of the shim with room for a message, which is the error unless it returns 0.
pub(super) fn message(call: impl FnOnce(*mut c_char, usize) -> i32) -> Result<(), String> {
    let mut text = vec![0_u8; MESSAGE_BYTES];
    if call(text.as_mut_ptr().cast(), text.len()) == 0 {
        return Ok(());
    }
    let text = CStr::from_bytes_until_nul(&text).map(|text| text.to_string_lossy().into_owned());
    Err(text.unwrap_or_default())
}

fn function<F: Copy>(library: &Dylib, path: &Path, name: &CStr) -> Result<F, TensorRtError> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let symbol = library.symbol(name).ok_or_else(|| {
        let reason = format!("there is no {}", name.to_string_lossy());
        TensorRtError::Library { path: path.to_owned(), reason }
    })?;
    // SAFETY: the library was compiled from the header that the types above follow, and stays open as long as they are used.
    Ok(unsafe { std::mem::transmute_copy(&symbol.as_ptr()) })
}

fn c_path(path: &Path) -> Result<CString, TensorRtError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|e| TensorRtError::Library { path: path.to_owned(), reason: e.to_string() })
}
