//! Compiles the kernels with NVRTC, once for each kind of device: what it makes is kept on disk under the hash of everything
//! that it was made from.

use super::error::CudaError;
use super::libraries::require;
use cudarc::nvrtc::{result, sys};
use sha2::{Digest as _, Sha256};
use std::ffi::{CStr, CString};
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What a device's code is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Architecture {
    /// First number of the compute capability.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// A source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `plugins/topk_prune/kernel.cu`.
    TopKPrune,
    /// `plugins/strided_compress/kernel.cu`.
    StridedCompress,
    /// `plugins/append_rows/kernel.cu`.
    AppendRows,
}

impl Source {
    /// All of them.
    pub const ALL: [Source; 3] = [Source::TopKPrune, Source::StridedCompress, Source::AppendRows];
    /// Those of operators in graphs.
    pub const OPERATORS: [Source; 2] = [Source::TopKPrune, Source::StridedCompress];

    /// The folder in `plugins`, which is also the name of its compiled kernels.
    pub const fn name(self) -> &'static str {
        match self {
            Source::TopKPrune => "topk_prune",
            Source::StridedCompress => "strided_compress",
            Source::AppendRows => "append_rows",
        }
    }

    const fn file(self) -> &'static str {
        match self {
            Source::TopKPrune => "plugins/topk_prune/kernel.cu",
            Source::StridedCompress => "plugins/strided_compress/kernel.cu",
            Source::AppendRows => "plugins/append_rows/kernel.cu",
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Source::TopKPrune => include_str!("../../plugins/topk_prune/kernel.cu"),
            Source::StridedCompress => include_str!("../../plugins/strided_compress/kernel.cu"),
            Source::AppendRows => include_str!("../../plugins/append_rows/kernel.cu"),
        }
    }
}

/// The headers, by the names that sources include them by.
const HEADERS: [(&CStr, &str); 3] = [
    (c"accordion_kernels.h", include_str!("../../plugins/cuda/accordion_kernels.h")),
    (c"device.cuh", include_str!("../../plugins/cuda/device.cuh")),
    (c"rows.cuh", include_str!("../../plugins/cuda/rows.cuh")),
];

/// The functions that are used here.
const FUNCTIONS: [&CStr; 8] = [
    c"nvrtcVersion",
    c"nvrtcCreateProgram",
    c"nvrtcCompileProgram",
    c"nvrtcDestroyProgram",
    c"nvrtcGetCUBINSize",
    c"nvrtcGetCUBIN",
    c"nvrtcGetProgramLogSize",
    c"nvrtcGetProgramLog",
];

/// How every compiled kernel begins.
const ELF: &[u8] = b"\x7fELF";

/// Compiles, or takes what an earlier call with the same sources, options and compiler left in `cache`.
///
/// # Errors
///
/// There is no NVRTC, it does not know the architecture, or the cache cannot be written.
pub fn cached(source: Source, architecture: Architecture, cache: &Path) -> Result<Vec<u8>, CudaError> {
    let path = cache.join(entry(source, architecture, compiler_version()?));
    if let Ok(code) = std::fs::read(&path)
        && code.starts_with(ELF)
    {
        return Ok(code);
    }
    let code = compile(source, architecture)?;
    store(&path, &code)?;
    Ok(code)
}

/// Compiles.
///
/// # Errors
///
/// There is no NVRTC, or it does not know the architecture.
pub fn compile(source: Source, architecture: Architecture) -> Result<Vec<u8>, CudaError> {
    compiler_version()?;
    let program = Program::of(source).map_err(|error| failed(source, architecture, &error.to_string()))?;
    let options = options(architecture);
    // SAFETY: the program is alive, as it is in the calls below.
    let compiled = unsafe { result::compile_program(program.handle, &options) };
    compiled.map_err(|error| failed(source, architecture, &format!("{error}\n{}", program.log())))?;
    let mut size = 0;
    // SAFETY: the size is what the second call fills.
    let code = unsafe {
        sys::nvrtcGetCUBINSize(program.handle, &raw mut size).result().and_then(|()| {
            let mut code = vec![0_u8; size];
            sys::nvrtcGetCUBIN(program.handle, code.as_mut_ptr().cast()).result().map(|()| code)
        })
    };
    code.map_err(|error| failed(source, architecture, &error.to_string()))
}

fn options(architecture: Architecture) -> [String; 2] {
    [format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()]
}

fn failed(source: Source, architecture: Architecture, log: &str) -> CudaError {
    let (file, architecture) = (source.file(), architecture.to_string());
    CudaError::Compile { file, architecture, log: log.trim().to_owned() }
}

/// The version of NVRTC, if there is one.
fn compiler_version() -> Result<(i32, i32), CudaError> {
    require("nvrtc", "NVRTC", &FUNCTIONS).map_err(|reason| CudaError::Compiler { reason })?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and the places for the numbers are valid.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(|error| CudaError::Compiler { reason: format!("NVRTC does not say its version: {error}") })?;
    Ok((major, minor))
}

/// The file of a compiled source: `topk_prune.sm_90.0123456789abcdef.cubin`.
fn entry(source: Source, architecture: Architecture, compiler: (i32, i32)) -> PathBuf {
    let mut digest = Sha256::new();
    let texts = HEADERS.iter().map(|(_, text)| *text).chain([source.text()]);
    for text in texts.map(str::to_owned).chain(options(architecture)).chain([format!("{}.{}", compiler.0, compiler.1)])
    {
        digest.update(text.len().to_le_bytes());
        digest.update(text);
    }
    let digest = format!("{:x}", digest.finalize());
    format!("{}.{architecture}.{}.cubin", source.name(), &digest[..16]).into()
}

/// Written aside and renamed: another process never reads half of it.
fn store(path: &Path, code: &[u8]) -> Result<(), CudaError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(code)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|source| CudaError::Io { path: path.to_owned(), source })
}

/// A program of NVRTC's, destroyed when dropped.
struct Program {
    handle: sys::nvrtcProgram,
    /// It points into these.
    _texts: Vec<CString>,
}

impl Program {
    fn of(source: Source) -> Result<Self, result::NvrtcError> {
        // None of our own texts contains a zero.
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let texts: Vec<CString> = HEADERS.iter().map(|(_, header)| text(header)).chain([text(source.text())]).collect();
        let name = text(source.file());
        let headers: Vec<_> = texts.iter().take(HEADERS.len()).map(|text| text.as_ptr()).collect();
        let names = HEADERS.map(|(name, _)| name.as_ptr());
        let mut handle = std::ptr::null_mut();
        // SAFETY: as many headers as names, all of them C strings that live as long as the program; the name is copied.
        unsafe {
            sys::nvrtcCreateProgram(
                &raw mut handle,
                texts[HEADERS.len()].as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                headers.as_ptr(),
                names.as_ptr(),
            )
        }
        .result()?;
        Ok(Self { handle, _texts: texts })
    }

    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.handle) }.unwrap_or_default();
        let bytes: Vec<u8> = log.into_iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `of`, and destroyed once. Nothing can be done about a failure.
        let _ = unsafe { result::destroy_program(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const HOPPER: Architecture = Architecture { major: 9, minor: 0 };

    #[test]
    fn entries_differ_by_source_architecture_and_compiler() {
        let ampere = Architecture { major: 8, minor: 0 };
        let entries = [
            entry(Source::TopKPrune, HOPPER, (13, 0)),
            entry(Source::TopKPrune, HOPPER, (13, 1)),
            entry(Source::TopKPrune, ampere, (13, 0)),
            entry(Source::StridedCompress, HOPPER, (13, 0)),
        ];
        for (i, one) in entries.iter().enumerate() {
            assert_eq!(one.extension().unwrap(), "cubin", "{one:?}");
            assert!(entries[..i].iter().all(|other| other != one), "{one:?}");
        }
        assert_eq!(entries[0], entry(Source::TopKPrune, HOPPER, (13, 0)));
    }

    #[test]
    fn an_entry_is_whole_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("kernels/a.cubin");
        store(&path, b"\x7fELF code").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"\x7fELF code");
        let files: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(files.len(), 1, "{files:?}");

        // A folder that is a file cannot be written to, and is named.
        let error = store(&path.join("b.cubin"), b"").unwrap_err().to_string();
        assert!(error.contains("a.cubin"), "{error}");
    }

    /// With NVRTC, the kernels compile for every architecture that is shipped; without, what is missing is said.
    #[test]
    fn kernels_compile_where_there_is_a_compiler() {
        let cache = tempfile::tempdir().unwrap();
        for source in Source::ALL {
            for (major, minor) in [(8, 0), (8, 9), (9, 0), (10, 0)] {
                match cached(source, Architecture { major, minor }, cache.path()) {
                    Ok(code) => assert!(code.starts_with(ELF)),
                    Err(CudaError::Compiler { reason }) => {
                        assert_eq!(require("nvrtc", "NVRTC", &FUNCTIONS), Err(reason));
                        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
                        return;
                    }
                    Err(error) => unreachable!("{error}"),
                }
            }
        }
        let mut entries: Vec<PathBuf> = std::fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(entries.len(), 4 * Source::ALL.len());

        // What is there is taken, unless it is no code.
        entries.sort();
        let one = entries.iter().find(|path| path.to_str().unwrap().contains("topk_prune.sm_90.")).unwrap();
        std::fs::write(one, b"\x7fELF of another").unwrap();
        assert_eq!(cached(Source::TopKPrune, HOPPER, cache.path()).unwrap(), b"\x7fELF of another");
        std::fs::write(one, b"half").unwrap();
        assert!(cached(Source::TopKPrune, HOPPER, cache.path()).unwrap().len() > 1000);
        let unknown = compile(Source::TopKPrune, Architecture { major: 1, minor: 0 }).unwrap_err().to_string();
        assert!(unknown.contains("plugins/topk_prune/kernel.cu does not compile for sm_10"), "{unknown}");
    }
}
