//! ONNX Runtime, and its CPU provider.

use crate::cli::fetch::show;
use crate::cli::output::Output;
use accordion::bundle::Bundle;
use accordion::fetch::Progress;
use accordion::runtime::locate::{self, LoadOptions, LoadedRuntime};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion_graphs::dtype::DType;
use anyhow::ensure;

/// What loads the graphs of `bundle`, with our kernels if they are to run the fused operators.
pub(super) fn loader(bundle: &Bundle, fused: bool, output: &Output) -> anyhow::Result<OrtCpu> {
    let format = bundle.manifest().float16();
    ensure!(
        format != Some(DType::Bf16),
        "{}: ONNX Runtime's CPU provider does not compute in bf16: export with --emulate to see its numbers on a CPU, or with \
         --target ort-cpu for weights in bf16",
        bundle.dir().display()
    );
    // Our kernels take fp32.
    let options = OrtOptions { fused_operators: fused && format.is_none() };
    Ok(OrtCpu::new(runtime(output)?, bundle.weights().clone(), &options)?)
}

/// ONNX Runtime, fetched into the cache if it is nowhere else.
pub(crate) fn runtime(output: &Output) -> anyhow::Result<&'static LoadedRuntime> {
    let mut bar = None;
    let mut on_progress = |progress: Progress| show(&mut bar, output, progress);
    let options = LoadOptions::fetching(&mut on_progress).with_threads(output.threads());
    Ok(locate::load(options)?)
}
