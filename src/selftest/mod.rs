//! Tries the CUDA kernels on a real device: their results against the CPU's, and their times against a copy's. Needs the
//! driver, and for products cuBLASLt; no model, no network.
//!
//! With ONNX Runtime's CUDA provider also the fused operators against the standard ones that they stand for ([`unfused`]), and all
//! methods against plain ([`methods`]).
//!
//! The same cases run in this project's tests, by an emulator of the device.

pub mod append;
pub mod compress;
mod host;
pub mod methods;
pub mod models;
mod numbers;
pub mod prune;
mod schema;
mod shapes;
mod times;
pub mod unfused;

pub use host::Host;
pub use numbers::{encode, identities};
pub use schema::{AgainstPlain, Check, MethodCost, Report, SCHEMA, SpeedUp, Time, Unfused};
pub use shapes::{CompressShape, PruneShape};

use crate::checkpoint::WeightMaps;
use crate::cuda::{CublasLt, CudaError, Device, Kernels, Origin};
use crate::environment::Nvidia;
use crate::runtime::bound::Bound;
use crate::runtime::locate::{LoadOptions, load};
use crate::runtime::ort_cuda::{self, OrtCudaOptions};
use accordion_graphs::weights::WeightIndex;
use accordion_plugins::topk_prune::PruneError;
use host::{Gpu, Recorded};
use std::time::{SystemTime, UNIX_EPOCH};

/// What checks call the kernel that appends a row to every cache, which is no operator.
const APPEND: &str = "rows appended to caches";

/// What to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Number of the device.
    pub device: usize,
    /// Where the kernels come from.
    pub kernels: Origin,
    /// Whether to measure times, and to compare with unfused operators.
    pub times: bool,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelftestError {
    /// The device, its driver or a library.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A case that the CPU's implementation refuses.
    #[error("the case {case}: {source}")]
    Case {
        /// Which one.
        case: String,
        /// Why.
        source: PruneError,
    },
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// What is tried now.
    pub what: &'a str,
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub of: usize,
}

/// Tries everything. `on_step` hears what comes next.
///
/// # Errors
///
/// There is no driver, device or code for it, or the device fails. A kernel that computes something else is no error but a
/// check that has not passed.
pub fn run(options: &Options, on_step: &mut dyn FnMut(Progress<'_>)) -> Result<Report, SelftestError> {
    let unix_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (pruned, compressed, appended) = (prune::cases(), compress::cases(), append::cases());
    let of = pruned.len() + compressed.len() + appended.len() + 1;
    let device = Device::open(options.device)?;
    let facts = device.facts()?;
    let kernels = Kernels::load(&device, &options.kernels)?;
    let mut missing = Vec::new();
    let cublaslt = CublasLt::open(&device).map_err(|error| missing.push(format!("products: {error}"))).ok();
    let gpu = Gpu { device, kernels, cublaslt };

    let mut checks = Vec::new();
    for (case, tried) in pruned {
        on_step(Progress { what: &case, done: checks.len(), of });
        let tensors = tried.tensors();
        let expected = tried.expected(&tensors).map_err(|source| SelftestError::Case { case: case.clone(), source })?;
        checks.push(Check::of("TopKPrune", case, tried.on(&gpu, &tensors)?.difference(&expected)));
    }
    for (case, tried) in compressed {
        on_step(Progress { what: &case, done: checks.len(), of });
        let tensors = tried.tensors();
        let difference = tried.on(&gpu, &tensors)?.difference(&tried.expected(&tensors));
        checks.push(Check::of("StridedCompress", case, difference));
    }
    for (case, tried) in appended {
        on_step(Progress { what: &case, done: checks.len(), of });
        let tensors = tried.tensors();
        let difference = tried.on(&gpu, &tensors)?.difference(&tried.expected(&tensors));
        checks.push(Check::of(APPEND, case, difference));
    }
    checks.extend(recorded(&gpu)?);
    let (mut copy_bandwidth, mut times) = (None, Vec::new());
    if options.times {
        on_step(Progress { what: "times", done: of - 1, of });
        let meter = times::Meter::new(&gpu, &facts)?;
        copy_bandwidth = Some(meter.copy_bandwidth);
        times = meter.all(&mut missing)?;
    }
    let (mut runtime, mut unfused) = (None, Vec::new());
    if options.times {
        match onnx_runtime(options) {
            Ok((name, loader)) => {
                on_step(Progress { what: "against unfused operators", done: of - 1, of });
                unfused = unfused::all(&loader, facts.free_bytes, &mut missing);
                runtime = Some(name);
            }
            Err(reason) => missing.push(format!("fused operators against unfused ones, and methods: {reason}")),
        }
    }
    let (driver, cuda) = match Nvidia::probe() {
        Nvidia::Present { driver, cuda, .. } => (driver, cuda),
        Nvidia::Absent { .. } => (String::new(), String::new()),
    };
    Ok(Report {
        schema: SCHEMA.to_owned(),
        accordion: env!("CARGO_PKG_VERSION").to_owned(),
        unix_time,
        driver,
        cuda,
        device: facts,
        kernels: match &options.kernels {
            Origin::Folder(folder) => format!("compiled, from {}", folder.display()),
            Origin::Compiler(_) => "compiled here by NVRTC".to_owned(),
        },
        runtime,
        passed: checks.iter().all(|check| check.passed) && unfused.iter().all(|compared| compared.passed),
        checks,
        copy_bandwidth,
        times,
        unfused,
        methods: Vec::new(),
        missing,
    })
}

/// ONNX Runtime on the device, with our kernels and no weights, and what it is called.
fn onnx_runtime(options: &Options) -> Result<(String, Bound<ort_cuda::Gpu>), String> {
    let runtime = load(LoadOptions::default()).map_err(|error| error.to_string())?;
    let weights = WeightMaps::open(WeightIndex::default()).map_err(|error| error.to_string())?;
    let cuda = OrtCudaOptions { device: options.device, kernels: Some(options.kernels.clone()), allow_fallback: false };
    let loader = ort_cuda::open(runtime, weights, &cuda).map_err(|error| error.to_string())?;
    let library = runtime.library();
    Ok((format!("ONNX Runtime {}, {}", library.version, library.path.display()), loader))
}

/// One case of each operator and of the appended row, recorded as a CUDA graph.
fn recorded(gpu: &Gpu) -> Result<[Check; 3], SelftestError> {
    let case = || "recorded as a CUDA graph".to_owned();
    let tensors = prune::SMALL.tensors();
    let expected = prune::SMALL.expected(&tensors).map_err(|source| SelftestError::Case { case: case(), source })?;
    let pruned = prune::SMALL.on(&Recorded(gpu), &tensors)?.difference(&expected);
    let tensors = compress::SMALL.tensors();
    let compressed = compress::SMALL.on(&Recorded(gpu), &tensors)?.difference(&compress::SMALL.expected(&tensors));
    let tensors = append::SMALL.tensors();
    let appended = append::SMALL.on(&Recorded(gpu), &tensors)?.difference(&append::SMALL.expected(&tensors));
    Ok([
        Check::of("TopKPrune", case(), pruned),
        Check::of("StridedCompress", case(), compressed),
        Check::of(APPEND, case(), appended),
    ])
}

impl Check {
    fn of(operator: &str, case: String, difference: Option<String>) -> Check {
        let passed = difference.is_none();
        Check { operator: operator.to_owned(), case, passed, difference: difference.unwrap_or_default() }
    }
}
