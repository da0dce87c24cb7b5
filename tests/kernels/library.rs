//! Compiles the kernels with the C++ compiler and loads them.

use crate::guarded::Guarded;
use accordion::cuda::{Address, AppendRows, Refusal, StridedCompress, StridedRows, TopKPrune};
use accordion::selftest::Host;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What a function says: null, or a message.
type Message = *const c_char;

type Stream = *mut c_void;
type TopKPruneFn = unsafe extern "C" fn(*const TopKPrune, Stream) -> Message;
type StridedRowsFn = unsafe extern "C" fn(*const StridedRows, Stream) -> Message;
type AppendRowsFn = unsafe extern "C" fn(*const AppendRows, Stream) -> Message;
type StridedCompressFn = unsafe extern "C" fn(*mut c_void, *const StridedCompress, Stream) -> Message;
type WorkspaceFn = unsafe extern "C" fn(*const StridedCompress) -> usize;
type OpenFn = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> Message;
type CloseFn = unsafe extern "C" fn(*mut c_void);

/// The C interface, `plugins/cuda/accordion_kernels.h`.
pub(crate) struct Library {
    topk_prune: TopKPruneFn,
    strided_rows: StridedRowsFn,
    append_rows: AppendRowsFn,
    strided_compress: StridedCompressFn,
    strided_compress_workspace: WorkspaceFn,
    cublaslt_open: OpenFn,
    cublaslt_close: CloseFn,
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Builds a shared library from C++ sources, in a folder of its own: aside and renamed, because another process may use it.
pub(crate) fn compile(name: &str, sources: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{name}"));
    std::fs::create_dir_all(&folder).unwrap();
    let library = tempfile::NamedTempFile::new_in(&folder).unwrap().into_temp_path();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unknown-pragmas", "-x", "c++", "-I"])
        .arg(source("plugins/cuda"))
        .arg("-I")
        .arg(source("plugins/strided_compress"))
        .args(sources.iter().map(|name| source(name)))
        .arg("-o")
        .arg::<&Path>(&library)
        .arg("-ldl")
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = folder.join(name);
    library.persist(&path).unwrap();
    path
}

fn open(path: &Path) -> *mut c_void {
    let path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a library that was just built; it is never closed.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null());
    handle
}

/// The emulated kernels.
pub(crate) fn kernels() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let sources = [
            "topk_prune/kernel.cu",
            "strided_compress/kernel.cu",
            "strided_compress/cublaslt.cpp",
            "append_rows/kernel.cu",
        ]
        .map(|s| format!("plugins/{s}"));
        let path = compile("libaccordion_kernels.so", &sources.each_ref().map(String::as_str));
        let handle = open(&path);
        macro_rules! symbol {
            ($name:literal, $function:ty) => {{
                // SAFETY: the handle is open.
                let symbol = unsafe { libc::dlsym(handle, $name.as_ptr()) };
                assert!(!symbol.is_null(), "{:?}", $name);
                // SAFETY: the type is the declaration's.
                unsafe { std::mem::transmute::<*mut c_void, $function>(symbol) }
            }};
        }
        Library {
            topk_prune: symbol!(c"accordion_topk_prune", TopKPruneFn),
            strided_rows: symbol!(c"accordion_strided_rows", StridedRowsFn),
            append_rows: symbol!(c"accordion_append_rows", AppendRowsFn),
            strided_compress: symbol!(c"accordion_strided_compress", StridedCompressFn),
            strided_compress_workspace: symbol!(c"accordion_strided_compress_workspace", WorkspaceFn),
            cublaslt_open: symbol!(c"accordion_cublaslt_open", OpenFn),
            cublaslt_close: symbol!(c"accordion_cublaslt_close", CloseFn),
        }
    })
}

/// A cuBLASLt that multiplies on the CPU.
pub(crate) fn cublaslt() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| compile("libcublasLt.so", &["tests/kernels/cublaslt.cpp"]))
}

fn result(message: Message) -> Result<(), String> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: messages live as long as the library.
    Err(unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned())
}

impl Library {
    /// # Safety
    ///
    /// The pointers are those of tensors with the call's lengths.
    pub(crate) unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), String> {
        // SAFETY: the caller's promise.
        result(unsafe { (self.topk_prune)(call, std::ptr::null_mut()) })
    }

    /// # Safety
    ///
    /// As for `topk_prune`.
    pub(crate) unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), String> {
        // SAFETY: the caller's promise.
        result(unsafe { (self.strided_rows)(call, std::ptr::null_mut()) })
    }

    /// # Safety
    ///
    /// As for `topk_prune`.
    pub(crate) unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), String> {
        // SAFETY: the caller's promise.
        result(unsafe { (self.append_rows)(call, std::ptr::null_mut()) })
    }

    /// # Safety
    ///
    /// As for `topk_prune`; the workspace is the call's.
    pub(crate) unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<(), String> {
        let path = CString::new(cublaslt().to_str().unwrap()).unwrap();
        let mut cublaslt = std::ptr::null_mut();
        // SAFETY: the caller's promise; what is opened is closed.
        unsafe {
            result((self.cublaslt_open)(path.as_ptr(), &raw mut cublaslt))?;
            let done = result((self.strided_compress)(cublaslt, call, std::ptr::null_mut()));
            (self.cublaslt_close)(cublaslt);
            done
        }
    }

    pub(crate) fn strided_compress_workspace(&self, call: &StridedCompress) -> usize {
        // SAFETY: it reads the lengths alone.
        unsafe { (self.strided_compress_workspace)(call) }
    }

    pub(crate) fn open_cublaslt(&self, path: &CStr) -> Result<(), String> {
        let mut cublaslt = std::ptr::null_mut();
        // SAFETY: the path is a C string, and what is opened is closed.
        unsafe {
            result((self.cublaslt_open)(path.as_ptr(), &raw mut cublaslt))?;
            (self.cublaslt_close)(cublaslt);
        }
        Ok(())
    }
}

/// Runs kernels by the emulator, on memory that ends where the process may not go.
pub(crate) struct Emulator;

/// Why the emulator did not run something.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused(String);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Refused(refusal.to_string())
    }
}

impl Host for Emulator {
    type Memory = Guarded;
    type Error = Refused;

    fn upload(&self, bytes: &[u8]) -> Result<Guarded, Refused> {
        Ok(Guarded::of(bytes))
    }

    fn address(memory: &Guarded) -> Address {
        memory.address()
    }

    fn download(&self, memory: &Guarded) -> Result<Vec<u8>, Refused> {
        Ok(memory.read())
    }

    unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), Refused> {
        assert!(call.launches().is_ok_and(|launches| launches.len() <= 3));
        // SAFETY: the caller's promise.
        unsafe { kernels().topk_prune(call) }.map_err(Refused)
    }

    unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), Refused> {
        // SAFETY: the caller's promise.
        unsafe { kernels().strided_rows(call) }.map_err(Refused)
    }

    unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<bool, Refused> {
        assert_eq!(kernels().strided_compress_workspace(call), call.workspace_bytes);
        // SAFETY: the caller's promise.
        unsafe { kernels().strided_compress(call) }.map_err(Refused)?;
        Ok(true)
    }

    unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), Refused> {
        // SAFETY: the caller's promise.
        unsafe { kernels().append_rows(call) }.map_err(Refused)
    }
}
