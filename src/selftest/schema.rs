//! What a self-test says, as JSON.

use crate::cuda::DeviceFacts;
use serde::{Deserialize, Serialize};

/// Name and version of the format.
pub const SCHEMA: &str = "accordion.selftest-gpu/1";

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// Version of this program.
    pub accordion: String,
    /// Seconds since 1970 when it began.
    pub unix_time: u64,
    /// Version of the NVIDIA driver, empty where the system does not say.
    pub driver: String,
    /// The newest CUDA version that the driver can run.
    pub cuda: String,
    /// The device.
    pub device: DeviceFacts,
    /// Where the kernels come from.
    pub kernels: String,
    /// Whether every check passed.
    pub passed: bool,
    /// The kernels' results against the CPU's.
    pub checks: Vec<Check>,
    /// What a copy on the device moves, read and written together, in bytes per second; none if times were not wanted.
    pub copy_bandwidth: Option<f64>,
    /// The kernels' times.
    pub times: Vec<Time>,
    /// What was not done, and why.
    pub missing: Vec<String>,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// `TopKPrune`, `StridedCompress`.
    pub operator: String,
    /// What was tried.
    pub case: String,
    /// Whether the outputs are the same.
    pub passed: bool,
    /// The first difference; empty if there is none.
    pub difference: String,
}

/// How long something took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// What.
    pub name: String,
    /// With which lengths.
    pub shape: String,
    /// Measured runs.
    pub runs: usize,
    /// Half of the runs took at most this many milliseconds.
    pub median_ms: f64,
    /// The fastest took this many milliseconds.
    pub best_ms: f64,
    /// Bytes that must be read and written once.
    pub bytes: u64,
    /// Those bytes by the median time, in bytes per second.
    pub bandwidth: f64,
    /// Share of the copy's bandwidth.
    pub of_copy: f64,
    /// Whether all of it fits into the second-level cache: the share then says nothing about the memory.
    pub fits_l2: bool,
}
