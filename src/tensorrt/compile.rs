//! Compiling the shim, whose sources are part of this program, with the headers of a [`Toolkit`].
//!
//! What is compiled is kept in the user's cache, under the hash of everything it was made from.

use super::TensorRtError;
use super::toolkit::Toolkit;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

const HEADER: &str = include_str!("../../plugins/tensorrt/shim.h");
const SOURCE: &str = include_str!("../../plugins/tensorrt/shim.cpp");
/// The only names that NVIDIA's headers take from CUDA's: nobody needs the CUDA toolkit for them.
const CUDA_NAMES: &str = include_str!("../../plugins/tensorrt/cuda_runtime_api.h");

/// The compiled shim for `toolkit`, made below `cache` if it is not there.
pub(super) fn compiled(toolkit: &Toolkit, cache: &Path) -> Result<PathBuf, TensorRtError> {
    let mut digest = Sha256::new();
    for text in [HEADER, SOURCE, CUDA_NAMES] {
        digest.update(text);
    }
    for name in ["NvInferVersion.h", "NvInfer.h", "NvInferRuntime.h", "NvOnnxParser.h"] {
        let path = toolkit.headers.join(name);
        digest.update(std::fs::read(&path).map_err(TensorRtError::io(&path))?);
    }
    let hash = format!("{:x}", digest.finalize());
    let place = cache.join(format!("{}-shim-{}", toolkit.flavour.word(), &hash[..12]));
    let library = place.join("libaccordion_shim.so");
    if library.is_file() {
        return Ok(library);
    }
    std::fs::create_dir_all(cache).map_err(TensorRtError::io(cache))?;
    let aside = tempfile::Builder::new().prefix(".shim-").tempdir_in(cache).map_err(TensorRtError::io(cache))?;
    for (name, text) in [("shim.h", HEADER), ("shim.cpp", SOURCE), ("cuda_runtime_api.h", CUDA_NAMES)] {
        let path = aside.path().join(name);
        std::fs::write(&path, text).map_err(TensorRtError::io(path))?;
    }
    compile(toolkit, aside.path())?;
    // Whoever comes second finds the folder taken, by something as good.
    let renamed = std::fs::rename(aside.path(), &place);
    if library.is_file() { Ok(library) } else { renamed.map(|()| library).map_err(TensorRtError::io(place)) }
}

fn compile(toolkit: &Toolkit, folder: &Path) -> Result<(), TensorRtError> {
    let named = std::env::var_os("CXX").filter(|name| !name.is_empty());
    let candidates: Vec<OsString> =
        named.map_or_else(|| ["c++", "g++", "clang++"].map(OsString::from).to_vec(), |name| vec![name]);
    for compiler in candidates {
        let mut command = Command::new(&compiler);
        command.current_dir(folder).args(["-std=c++17", "-O1", "-fPIC", "-shared", "-I.", "-isystem"]);
        command.arg(&toolkit.headers).args(["shim.cpp", "-o", "libaccordion_shim.so", "-ldl"]);
        let Ok(output) = command.output() else { continue };
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let first = text.lines().find(|line| line.contains("error")).unwrap_or("it failed without an error").to_owned();
        let compiler = compiler.to_string_lossy().into_owned();
        return Err(TensorRtError::Compile { compiler, headers: toolkit.headers.clone(), message: first });
    }
    Err(TensorRtError::NoCompiler)
}
