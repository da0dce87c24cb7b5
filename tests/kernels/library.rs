//! Compiles the kernels with the C++ compiler and loads them.

use crate::guarded::Guarded;
use accordion::cuda::{Address, Refusal, StridedCompress, StridedRows, TopKPrune};
use accordion::selftest::Host;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What a function says: null, or a message.
type Message = *const c_char;

/// The C interface, `plugins/cuda/accordion_kernels.h`.
pub(crate) struct Library {
    topk_prune: unsafe extern "C" fn(*const TopKPrune, *mut c_void) -> Message,
    strided_rows: unsafe extern "C" fn(*const StridedRows, *mut c_void) -> Message,
    strided_compress: unsafe extern "C" fn(*mut c_void, *const StridedCompress, *mut c_void) -> Message,
    strided_compress_workspace: unsafe extern "C" fn(*const StridedCompress) -> usize,
    cublaslt_open: unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> Message,
    cublaslt_close: unsafe extern "C" fn(*mut c_void),
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Builds a shared library from C++ sources, under a name that is this process's own.
pub(crate) fn compile(name: &str, sources: &[&str]) -> PathBuf {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}/{name}", std::process::id()));
    std::fs::create_dir_all(library.parent().unwrap()).unwrap();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unknown-pragmas", "-x", "c++", "-I"])
        .arg(source("plugins/cuda"))
        .arg("-I")
        .arg(source("plugins/strided_compress"))
        .args(sources.iter().map(|name| source(name)))
        .arg("-o")
        .arg(&library)
        .arg("-ldl")
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
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
        let sources = ["topk_prune/kernel.cu", "strided_compress/kernel.cu", "strided_compress/cublaslt.cpp"]
            .map(|s| format!("plugins/{s}"));
        let path = compile("libaccordion_kernels.so", &sources.each_ref().map(String::as_str));
        let handle = open(&path);
        std::fs::remove_file(path).unwrap();
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: the handle is open, and the type is the declaration's.
                let symbol = unsafe { libc::dlsym(handle, $name.as_ptr()) };
                assert!(!symbol.is_null(), "{:?}", $name);
                unsafe { std::mem::transmute(symbol) }
            }};
        }
        Library {
            topk_prune: symbol!(c"accordion_topk_prune"),
            strided_rows: symbol!(c"accordion_strided_rows"),
            strided_compress: symbol!(c"accordion_strided_compress"),
            strided_compress_workspace: symbol!(c"accordion_strided_compress_workspace"),
            cublaslt_open: symbol!(c"accordion_cublaslt_open"),
            cublaslt_close: symbol!(c"accordion_cublaslt_close"),
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
        result(unsafe { (self.topk_prune)(call, std::ptr::null_mut()) })
    }

    /// # Safety
    ///
    /// As for `topk_prune`.
    pub(crate) unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), String> {
        result(unsafe { (self.strided_rows)(call, std::ptr::null_mut()) })
    }

    /// # Safety
    ///
    /// As for `topk_prune`; the workspace is the call's.
    pub(crate) unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<(), String> {
        let path = CString::new(cublaslt().to_str().unwrap()).unwrap();
        let mut cublaslt = std::ptr::null_mut();
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
        // SAFETY: the caller's promise, as below.
        unsafe { kernels().topk_prune(call) }.map_err(Refused)
    }

    unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), Refused> {
        unsafe { kernels().strided_rows(call) }.map_err(Refused)
    }

    unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<bool, Refused> {
        assert_eq!(kernels().strided_compress_workspace(call), call.workspace_bytes);
        unsafe { kernels().strided_compress(call) }.map_err(Refused)?;
        Ok(true)
    }
}
