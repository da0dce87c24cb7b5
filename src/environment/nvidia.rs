//! NVIDIA's driver, devices and `TensorRT` libraries. All of it is optional, and none of it is linked.

use crate::runtime::locate::library_folders;
use cudarc::driver::{result, sys};
use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};

/// The driver and its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "status")]
pub enum Nvidia {
    /// There is no usable driver.
    Absent {
        /// What is missing.
        reason: String,
    },
    /// The driver works.
    Present {
        /// Version of the kernel driver: `580.82.07`; empty where the kernel does not say.
        driver: String,
        /// The newest CUDA version the driver can run: `13.0`.
        cuda: String,
        /// The devices.
        devices: Vec<Device>,
    },
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name: `NVIDIA H200`.
    pub name: String,
    /// Its compute capability: `9.0`.
    pub compute_capability: String,
    /// Its memory in bytes.
    pub memory_bytes: u64,
}

/// A `TensorRT` library file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorRtLibrary {
    /// `libnvinfer`, `libnvinfer_lean`, `libnvinfer_dispatch` or `libtensorrt_rtx`.
    pub name: String,
    /// Version in its file name; empty where there is none.
    pub version: String,
    /// The file, with links resolved.
    pub path: PathBuf,
}

/// What `cudarc` would look up, and panic without.
const DRIVER_SYMBOLS: [&CStr; 6] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuDeviceGetCount",
    c"cuDeviceGet",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
];

impl Nvidia {
    /// Asks the driver, if there is one.
    pub fn probe() -> Nvidia {
        devices().unwrap_or_else(|reason| Nvidia::Absent { reason })
    }
}

/// Whether `cudarc` can be used: it ends the program when the driver library is missing.
///
/// # Errors
///
/// What is missing.
pub fn driver_library() -> Result<(), String> {
    let functions: Vec<&CStr> = DRIVER_SYMBOLS.iter().copied().chain([c"cuDeviceTotalMem_v2"]).collect();
    crate::cuda::libraries::require("cuda", "NVIDIA driver", &functions)
}

fn devices() -> Result<Nvidia, String> {
    driver_library()?;
    let failed = |e: cudarc::driver::DriverError| format!("the NVIDIA driver does not start: {e}");
    result::init().map_err(failed)?;
    let mut cuda = 0;
    // SAFETY: `cuda` is a valid place for the result.
    unsafe { sys::cuDriverGetVersion(&raw mut cuda) }.result().map_err(failed)?;
    let count = result::device::get_count().map_err(failed)?;
    let devices = (0..count).map(device).collect::<Result<_, _>>().map_err(failed)?;
    let driver = fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default().trim().to_owned();
    Ok(Nvidia::Present { driver, cuda: format!("{}.{}", cuda / 1000, cuda % 1000 / 10), devices })
}

fn device(ordinal: i32) -> Result<Device, cudarc::driver::DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` comes from `get`.
    let (major, minor, memory) = unsafe {
        (
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
            result::device::total_mem(device)?,
        )
    };
    Ok(Device {
        name: result::device::get_name(device)?,
        compute_capability: format!("{major}.{minor}"),
        memory_bytes: memory as u64,
    })
}

/// The `TensorRT` libraries in the dynamic linker's folders and in the `tensorrt` packages of those Python package
/// folders.
pub(super) fn tensorrt_libraries(site_packages: &[PathBuf]) -> Vec<TensorRtLibrary> {
    let mut folders = library_folders(std::env::var_os);
    for packages in site_packages {
        let entries = fs::read_dir(packages).into_iter().flatten().flatten();
        folders.extend(entries.filter(|e| e.file_name().to_string_lossy().starts_with("tensorrt")).map(|e| e.path()));
    }
    let mut libraries: Vec<TensorRtLibrary> = folders.iter().flat_map(|folder| libraries_in(folder)).collect();
    libraries.sort();
    libraries.dedup_by(|a, b| a.path == b.path);
    libraries
}

fn libraries_in(folder: &Path) -> Vec<TensorRtLibrary> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| library(&entry.path().canonicalize().ok()?)).collect()
}

fn library(path: &Path) -> Option<TensorRtLibrary> {
    let (name, version) = path.file_name()?.to_str()?.split_once(".so")?;
    ["libnvinfer", "libnvinfer_lean", "libnvinfer_dispatch", "libtensorrt_rtx"].contains(&name).then(|| {
        let version = version.trim_start_matches('.').to_owned();
        TensorRtLibrary { name: name.to_owned(), version, path: path.to_owned() }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_driver_is_asked_only_where_there_is_one() {
        match (driver_library(), Nvidia::probe()) {
            (Err(missing), Nvidia::Absent { reason }) => assert_eq!(missing, reason),
            (Err(missing), present) => unreachable!("{missing}, and yet {present:?}"),
            // A library without a device or with an old kernel driver is absent for a reason of its own.
            (Ok(()), _) => {}
        }
    }

    #[test]
    fn tensorrt_is_found_in_python_packages_once() {
        let packages = tempfile::tempdir().unwrap();
        let folder = packages.path().join("tensorrt_libs");
        fs::create_dir(&folder).unwrap();
        for name in ["libnvinfer.so.11.4.0", "libnvinfer_plugin.so.11", "libnvinfer_builder_resource.so.11"] {
            fs::write(folder.join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("libnvinfer.so.11.4.0", folder.join("libnvinfer.so.11")).unwrap();
        let root = packages.path().canonicalize().unwrap();
        let mut found = tensorrt_libraries(&[packages.path().to_owned()]);
        found.retain(|library| library.path.starts_with(&root));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].name.as_str(), found[0].version.as_str()), ("libnvinfer", "11.4.0"));
    }
}
