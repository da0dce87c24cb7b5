//! How long the kernels take, as a share of what a copy on the same device moves.

use super::host::Gpu;
use super::numbers::{encode, integers};
use super::schema::Time;
use super::shapes::{COMPRESSED, CompressShape, PRUNED, PruneShape};
use crate::cuda::{
    Buffer, CublasLt, CudaError, Device, DeviceFacts, Element, Kernel, StridedCompress, StridedRows, TopKPrune,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use std::time::{Duration, Instant};

/// Runs before any that counts.
const WARM_UP: usize = 3;
/// Runs that count: at least and at most, and no more once this long has passed.
const FEWEST: usize = 10;
const MOST: usize = 200;
const LONG_ENOUGH: Duration = Duration::from_millis(500);

/// Element types that the operators are timed in: HOMER's and RCC's at their sizes.
const PRUNE_ELEMENT: Element = Element::F16;
const COMPRESS_ELEMENT: Element = Element::Bf16;

/// What times are measured on: a device, and what a copy there moves in bytes per second.
pub(super) struct Meter<'a> {
    gpu: &'a Gpu,
    facts: &'a DeviceFacts,
    /// Read and written together.
    pub(super) copy_bandwidth: f64,
}

/// Milliseconds of every run of `work`.
fn run(device: &Device, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<Vec<f64>, CudaError> {
    for _ in 0..WARM_UP {
        work()?;
    }
    device.wait()?;
    let begin = Instant::now();
    let mut milliseconds = Vec::new();
    while milliseconds.len() < FEWEST || (milliseconds.len() < MOST && begin.elapsed() < LONG_ENOUGH) {
        let before = device.moment()?;
        work()?;
        let after = device.moment()?;
        milliseconds.push(before.milliseconds_to(&after)?);
    }
    milliseconds.sort_by(f64::total_cmp);
    Ok(milliseconds)
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

impl<'a> Meter<'a> {
    /// Measures the copy: of a gigabyte, or what fits twice into a quarter of the free memory.
    pub(super) fn new(gpu: &'a Gpu, facts: &'a DeviceFacts) -> Result<Self, CudaError> {
        let bytes = (facts.free_bytes / 8).min(1 << 30) as usize;
        let (from, mut to) = (gpu.device.zeros(bytes)?, gpu.device.zeros(bytes)?);
        let times = run(&gpu.device, || gpu.device.copy(&from, &mut to))?;
        Ok(Self { gpu, facts, copy_bandwidth: bandwidth(2 * bytes as u64, median(&times)) })
    }

    fn time(
        &self,
        name: &str,
        shape: &str,
        bytes: u64,
        work: impl FnMut() -> Result<(), CudaError>,
    ) -> Result<Time, CudaError> {
        let times = run(&self.gpu.device, work)?;
        let (median_ms, bandwidth) = (median(&times), bandwidth(bytes, median(&times)));
        Ok(Time {
            name: name.to_owned(),
            shape: shape.to_owned(),
            runs: times.len(),
            median_ms,
            best_ms: times[0],
            bytes,
            bandwidth,
            of_copy: bandwidth / self.copy_bandwidth,
            fits_l2: bytes < self.facts.l2_bytes,
        })
    }

    /// The kernels of both operators at the sizes of real models, as far as they fit into the memory.
    pub(super) fn all(&self, missing: &mut Vec<String>) -> Result<Vec<Time>, CudaError> {
        let mut times = Vec::new();
        for shape in PRUNED {
            if self.fits(shape.bytes(PRUNE_ELEMENT), shape.name, missing) {
                self.prune(&shape, &mut times)?;
            }
        }
        for shape in COMPRESSED {
            if self.fits(shape.bytes(COMPRESS_ELEMENT), shape.name, missing) {
                self.compress(&shape, &mut times)?;
            }
        }
        Ok(times)
    }

    fn fits(&self, bytes: u64, name: &str, missing: &mut Vec<String>) -> bool {
        let fits = bytes + (1 << 28) < self.facts.free_bytes;
        if !fits {
            missing.push(format!("times of {name}: it needs {bytes} bytes, and {} are free", self.facts.free_bytes));
        }
        fits
    }

    fn prune(&self, shape: &PruneShape, times: &mut Vec<Time>) -> Result<(), CudaError> {
        let PruneShape { heads, kv_heads, head_dim, length, hidden, layers, keep, .. } = *shape;
        let (gpu, device, size) = (self.gpu, &self.gpu.device, PRUNE_ELEMENT.bytes());
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut numbers = |count: usize| {
            let numbers: Vec<f32> =
                (0..count).map(|_| (random.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect();
            device.upload(&encode(&numbers, PRUNE_ELEMENT))
        };
        let kept = |rows: usize, width: usize| device.zeros(rows * width * size);
        let planes = layers * 2 * kv_heads;
        let (query_last, key) = (numbers(heads * head_dim)?, numbers(kv_heads * length * head_dim)?);
        let bias = device.zeros(length * 4)?;
        let position_ids = device.upload(&integers(&(0..length as i64).collect::<Vec<_>>()))?;
        let (hidden_states, kv) = (kept(length, hidden)?, kept(planes * length, head_dim)?);
        let (kept_hidden, kept_kv) = (kept(keep, hidden)?, kept(planes * keep, head_dim)?);
        let (keep_idx, kept_position_ids) = (device.zeros(keep * 8)?, device.zeros(keep * 8)?);
        let scores = device.zeros(length * 4)?;
        let call = TopKPrune {
            query_last: query_last.address(),
            key: key.address(),
            bias: bias.address(),
            position_ids: position_ids.address(),
            hidden: hidden_states.address(),
            kv: kv.address(),
            keep_idx: keep_idx.address(),
            kept_hidden: kept_hidden.address(),
            kept_position_ids: kept_position_ids.address(),
            kept_kv: kept_kv.address(),
            scores: scores.address(),
            batch: 1,
            heads: heads as i64,
            kv_heads: kv_heads as i64,
            head_dim: head_dim as i64,
            length: length as i64,
            hidden_size: hidden as i64,
            layers: layers as i64,
            keep: keep as i64,
            prefix_length: shape.affix as i64,
            suffix_length: shape.affix as i64,
            bias_length: length as i64,
            scale: 1.0 / (head_dim as f32).sqrt(),
            element: PRUNE_ELEMENT,
            hidden_element: PRUNE_ELEMENT,
            ..TopKPrune::default()
        };
        // SAFETY: every tensor has the elements that the lengths say, and lives until all times are taken: each one waits.
        times.push(
            self.time("TopKPrune", shape.name, shape.moved(PRUNE_ELEMENT), || unsafe {
                gpu.kernels.topk_prune(&call)
            })?,
        );
        for launch in call.launches()? {
            let (name, bytes) = match launch.kernel {
                Kernel::Select => ("TopKPrune: selection", (length * 4 + keep * 24) as u64),
                Kernel::Gather => ("TopKPrune: gathering", 2 * (keep * size * (hidden + planes * head_dim)) as u64),
                _ => ("TopKPrune: scores", (kv_heads * length * head_dim * size + length * 16) as u64),
            };
            // SAFETY: as above; the launches before it have run for the time of the whole.
            times.push(self.time(name, shape.name, bytes, || unsafe { gpu.kernels.launch(launch, &call) })?);
        }
        // SAFETY: as above.
        let graph = device.capture(|| unsafe { gpu.kernels.topk_prune(&call) })?;
        times.push(self.time("TopKPrune, as a CUDA graph", shape.name, shape.moved(PRUNE_ELEMENT), || graph.launch())?);
        device.wait()
    }

    fn compress(&self, shape: &CompressShape, times: &mut Vec<Time>) -> Result<(), CudaError> {
        let CompressShape { segments, window, ratio, width, .. } = *shape;
        let (gpu, device, element) = (self.gpu, &self.gpu.device, COMPRESS_ELEMENT);
        let kept = segments * window / ratio;
        let tensor = |rows: usize| device.zeros(rows * width * element.bytes());
        let (x, x2, weight) = (tensor(segments * window)?, tensor(segments * window)?, tensor(width)?);
        let (rows, y) = (tensor(kept)?, tensor(kept)?);
        let call = |x2: u64, y: &Buffer| StridedRows {
            x: x.address(),
            x2,
            y: y.address(),
            segments: segments as i64,
            window: window as i64,
            width: width as i64,
            ratio: ratio as i64,
            offset: ratio as i64 - 1,
            element,
        };
        let row_bytes = (kept * width * element.bytes()) as u64;
        let (select, mean) = (call(0, &rows), call(x2.address(), &rows));
        // SAFETY: every tensor has the elements that the lengths say, and lives until all times are taken: each one waits.
        let select_rows = || unsafe { gpu.kernels.strided_rows(&select) };
        times.push(self.time("StridedCompress: rows", shape.name, 2 * row_bytes, select_rows)?);
        // SAFETY: as above.
        let mean_rows = || unsafe { gpu.kernels.strided_rows(&mean) };
        times.push(self.time("StridedCompressMean: rows", shape.name, 3 * row_bytes, mean_rows)?);

        let Some(cublaslt) = &gpu.cublaslt else { return Ok(()) };
        let workspace_bytes = CublasLt::workspace_bytes(&mean)?;
        let workspace = device.zeros(workspace_bytes)?;
        let product = |rows: StridedRows| StridedCompress {
            rows,
            weight: weight.address(),
            out_width: width as i64,
            workspace: workspace.address(),
            workspace_bytes,
        };
        let moved = 2 * row_bytes + (width * width * element.bytes()) as u64;
        let strided = product(call(0, &y));
        // SAFETY: as above.
        let fused = || unsafe { cublaslt.compress(&gpu.kernels, &strided) };
        times.push(self.time("StridedCompress", shape.name, moved, fused)?);
        // The same by a copy of the rows and a product of what was copied.
        let dense = product(StridedRows {
            x: rows.address(),
            window: (window / ratio) as i64,
            ratio: 1,
            offset: 0,
            ..call(0, &y)
        });
        // SAFETY: as above.
        let unfused =
            || unsafe { gpu.kernels.strided_rows(&select).and_then(|()| cublaslt.compress(&gpu.kernels, &dense)) };
        times.push(self.time("StridedCompress, rows copied first", shape.name, moved + 2 * row_bytes, unfused)?);
        device.wait()
    }
}

fn bandwidth(bytes: u64, milliseconds: f64) -> f64 {
    bytes as f64 / (milliseconds / 1e3)
}
