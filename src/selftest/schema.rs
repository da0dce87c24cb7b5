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
    /// The ONNX Runtime with CUDA that runs chains and methods; none where there is none that works.
    #[serde(default)]
    pub runtime: Option<String>,
    /// Whether every check passed, and every comparison with an unfused chain.
    pub passed: bool,
    /// The kernels' results against the CPU's.
    pub checks: Vec<Check>,
    /// What a copy on the device moves, read and written together, in bytes per second; none if times were not wanted.
    pub copy_bandwidth: Option<f64>,
    /// The kernels' times.
    pub times: Vec<Time>,
    /// The fused operators against the standard operators that they stand for, both run by ONNX Runtime on the device.
    #[serde(default)]
    pub unfused: Vec<Unfused>,
    /// What methods cost in that runtime.
    #[serde(default)]
    pub methods: Vec<MethodCost>,
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

/// A fused operator against the chain of standard operators of its function body.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unfused {
    /// `TopKPrune`, `StridedCompress`, `StridedCompressMean`.
    pub operator: String,
    /// With which lengths.
    pub shape: String,
    /// Element type: `f16`.
    pub element: String,
    /// Measured runs of each side, in turns.
    pub runs: usize,
    /// Median time of the fused operator in milliseconds, from the call of the runtime to the end of the work.
    pub fused_ms: f64,
    /// The same of the chain.
    pub unfused_ms: f64,
    /// The chain's time over the operator's: how many times faster the operator is.
    pub ratio: f64,
    /// Whether both compute the same bits.
    pub passed: bool,
    /// The first difference; empty if there is none.
    pub difference: String,
}

/// What one method costs at one context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodCost {
    /// The shape of the model, whose weights are random.
    pub model: String,
    /// `plain`, `homer`, `rcc`, `sharedllm`.
    pub method: String,
    /// The engine, with its precision: `ort-cuda fp16`.
    pub engine: String,
    /// Tokens of the context.
    pub context: usize,
    /// Tokens in the context state.
    pub tokens_kept: usize,
    /// How often the prefix was built.
    pub runs: usize,
    /// Median time from token ids to context state, in milliseconds.
    pub prefix_ms: f64,
    /// Median time from there to the first new token.
    pub first_token_ms: f64,
    /// Median time of each further token.
    pub per_token_ms: f64,
    /// Size of the context state.
    pub state_bytes: u64,
    /// The most that was taken of the device's memory while it was measured, weights and libraries included; none where
    /// that is not known.
    pub peak_device_bytes: Option<u64>,
    /// Peak resident memory of the process.
    pub peak_resident_bytes: u64,
    /// What follows from plain on the same model at the same context; none for plain, and where it was not measured.
    pub against_plain: Option<AgainstPlain>,
}

/// A method beside plain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgainstPlain {
    /// Plain's prefix time over the method's.
    pub prefix_ratio: f64,
    /// By the number of new tokens.
    pub speed_up: Vec<SpeedUp>,
    /// `100 (1 - peak / plain's peak)` of the device's memory.
    pub memory_saving_percent: Option<f64>,
}

/// How much sooner so many tokens are there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpeedUp {
    /// New tokens, n.
    pub new_tokens: usize,
    /// `100 (t(plain) / t(method) - 1)`, where t is the prefix, the first token and n - 1 further ones.
    pub percent: f64,
}
