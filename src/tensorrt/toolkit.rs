//! Where NVIDIA's libraries and headers are.
//!
//! Searched in order: folders that are named (`--root`, then the flavour's variable, which may name several); the system's
//! library and include folders; the packages of the active Python, which have the libraries and no headers.

use super::TensorRtError;
use crate::environment::python_packages;
use crate::runtime::locate::library_folders;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Which of NVIDIA's two libraries. Their interfaces look the same and are not interchangeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavour {
    /// `TensorRT`: for data-centre devices; builds on the device it is for, and knows plugins.
    #[serde(rename = "tensorrt")]
    TensorRt,
    /// `TensorRT-RTX`: for graphics cards; builds anywhere, and has no plugins.
    #[serde(rename = "tensorrt-rtx")]
    TensorRtRtx,
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TensorRt => "TensorRT",
            Self::TensorRtRtx => "TensorRT-RTX",
        })
    }
}

impl Flavour {
    /// The word for it in flags, file names and JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::TensorRt => "tensorrt",
            Self::TensorRtRtx => "tensorrt-rtx",
        }
    }

    /// The environment variable that names its folders.
    pub fn root_variable(self) -> &'static str {
        match self {
            Self::TensorRt => "TENSORRT_ROOT",
            Self::TensorRtRtx => "TENSORRT_RTX_ROOT",
        }
    }

    /// File names of the library and of the ONNX parser that belongs to it, newest version first.
    fn libraries(self) -> &'static [[&'static str; 2]] {
        match self {
            Self::TensorRt => {
                &[["libnvinfer.so.11", "libnvonnxparser.so.11"], ["libnvinfer.so.10", "libnvonnxparser.so.10"]]
            }
            Self::TensorRtRtx => &[["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"]],
        }
    }

    /// The folder that its Python package keeps the libraries in.
    fn python_folder(self) -> &'static str {
        match self {
            Self::TensorRt => "tensorrt_libs",
            Self::TensorRtRtx => "tensorrt_rtx_libs",
        }
    }
}

/// NVIDIA's package on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolkit {
    /// Which.
    pub flavour: Flavour,
    /// The library.
    pub library: PathBuf,
    /// The ONNX parser.
    pub parser: PathBuf,
    /// The folder of `NvInfer.h` and `NvOnnxParser.h`.
    pub headers: PathBuf,
}

impl Toolkit {
    /// Looks for it, in `roots` first.
    ///
    /// # Errors
    ///
    /// The libraries or the headers are not there.
    pub fn find(flavour: Flavour, roots: &[PathBuf]) -> Result<Self, TensorRtError> {
        let mut named = roots.to_vec();
        named.extend(std::env::var_os(flavour.root_variable()).iter().flat_map(std::env::split_paths));
        let mut libraries = beneath(&named, &["", "lib", "lib64", "bin"]);
        libraries.extend(library_folders(std::env::var_os));
        libraries.extend(python_packages().iter().map(|folder| folder.join(flavour.python_folder())));
        let mut headers = beneath(&named, &["include", ""]);
        headers.extend(include_folders());
        Self::in_folders(flavour, libraries, headers)
    }

    fn in_folders(flavour: Flavour, libraries: Vec<PathBuf>, headers: Vec<PathBuf>) -> Result<Self, TensorRtError> {
        let pair = libraries.iter().find_map(|folder| {
            let pairs = flavour.libraries().iter().map(|pair| pair.map(|name| folder.join(name)));
            pairs.into_iter().find(|pair| pair.iter().all(|path| path.is_file()))
        });
        let [library, parser] = pair.ok_or_else(|| {
            let [library, parser] = flavour.libraries()[0];
            TensorRtError::Missing { flavour, what: format!("{library} and {parser}"), searched: libraries }
        })?;
        let found = headers.iter().find(|folder| belongs(folder, flavour)).cloned();
        let headers = found.ok_or_else(|| {
            let what = "its headers (NvInfer.h, NvOnnxParser.h)".to_owned();
            TensorRtError::Missing { flavour, what, searched: headers }
        })?;
        Ok(Self { flavour, library, parser, headers })
    }
}

/// Whether `folder` has the headers, and has them of this flavour: the two are told apart by a name that only one defines.
fn belongs(folder: &Path, flavour: Flavour) -> bool {
    let Ok(version) = std::fs::read_to_string(folder.join("NvInferVersion.h")) else { return false };
    ["NvInfer.h", "NvOnnxParser.h"].iter().all(|name| folder.join(name).is_file())
        && version.contains("TRT_MAJOR_RTX") == (flavour == Flavour::TensorRtRtx)
}

fn beneath(roots: &[PathBuf], folders: &[&str]) -> Vec<PathBuf> {
    roots.iter().flat_map(|root| folders.iter().map(|folder| root.join(folder))).collect()
}

fn include_folders() -> Vec<PathBuf> {
    let arch = std::env::consts::ARCH;
    let places = [format!("/usr/include/{arch}-linux-gnu"), "/usr/include".to_owned(), "/usr/local/include".to_owned()];
    places.map(PathBuf::from).to_vec()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;

    fn folder(version: &str, libraries: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("include")).unwrap();
        for name in ["NvInfer.h", "NvOnnxParser.h"] {
            fs::write(root.path().join("include").join(name), "").unwrap();
        }
        fs::write(root.path().join("include/NvInferVersion.h"), version).unwrap();
        fs::create_dir(root.path().join("lib")).unwrap();
        for name in libraries {
            fs::write(root.path().join("lib").join(name), "").unwrap();
        }
        root
    }

    fn find(flavour: Flavour, root: &Path) -> Result<Toolkit, TensorRtError> {
        Toolkit::in_folders(flavour, vec![root.join("lib")], vec![root.join("include")])
    }

    #[test]
    fn a_library_is_found_only_with_its_parser_and_the_newest_first() {
        let names = ["libnvinfer.so.11", "libnvinfer.so.10", "libnvonnxparser.so.10"];
        let root = folder("#define NV_TENSORRT_MAJOR 10", &names);
        let found = find(Flavour::TensorRt, root.path()).unwrap();
        assert_eq!(found.library, root.path().join("lib/libnvinfer.so.10"));
        assert_eq!(found.parser, root.path().join("lib/libnvonnxparser.so.10"));
        let error = find(Flavour::TensorRtRtx, root.path()).unwrap_err().to_string();
        assert!(error.contains("libtensorrt_rtx.so.1") && error.contains("TENSORRT_RTX_ROOT"), "{error}");
    }

    #[test]
    fn headers_of_the_other_flavour_are_not_taken() {
        let names = ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"];
        let root = folder("#define TRT_MAJOR_ENTERPRISE 11", &names);
        let error = find(Flavour::TensorRtRtx, root.path()).unwrap_err().to_string();
        assert!(error.contains("NvInfer.h"), "{error}");
        fs::write(root.path().join("include/NvInferVersion.h"), "#define TRT_MAJOR_RTX 1").unwrap();
        assert!(find(Flavour::TensorRtRtx, root.path()).is_ok());
    }
}
