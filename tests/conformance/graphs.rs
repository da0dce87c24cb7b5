//! The exported graphs as rows of the table: a bundle is written, opened and run, as the command does it.

use super::Implementation;
use super::compare::Tensors;
use accordion::bundle::Bundle;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::Engines;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use anyhow::Result;

/// Graphs of one target, with or without our kernels, at one batch width.
pub(crate) struct Graphs {
    name: &'static str,
    pub(crate) target: Target,
    fused_operators: bool,
    width: usize,
}

impl Graphs {
    pub(crate) fn all() -> Vec<Self> {
        let row = |name, target, fused_operators, width| Self { name, target, fused_operators, width };
        vec![
            row("portable, width 1", Target::Portable, false, 1),
            row("portable, width max", Target::Portable, false, usize::MAX),
            row("portable fused, width 2", Target::Portable, true, 2),
            row("ort-cpu, width 1", Target::OrtCpu, false, 1),
            row("ort-cpu, width max", Target::OrtCpu, false, usize::MAX),
            row("ort-cpu fused, width 1", Target::OrtCpu, true, 1),
            row("ort-cpu fused, width max", Target::OrtCpu, true, usize::MAX),
        ]
    }

    pub(crate) fn engines<'b>(&self, bundle: &'b Bundle) -> Result<Engines<'b>> {
        let runtime = load(LoadOptions::fetching(&mut |_| {}))?;
        let options = OrtOptions { fused_operators: self.fused_operators };
        let loader = OrtCpu::new(runtime, bundle.weights().clone(), &options)?;
        Ok(Engines::new(bundle, Box::new(loader)))
    }
}

impl Implementation for Graphs {
    fn name(&self) -> &'static str {
        self.name
    }

    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = golden::homer::bundle(case, plan, self.target, folder.path())?;
        Ok(golden::homer::graphs(case, plan, &mut self.engines(&bundle)?, self.width)?)
    }

    fn rcc(&mut self, case: &RccCase) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = golden::rcc::bundle(case, self.target, folder.path())?;
        Ok(golden::rcc::graphs(case, &mut self.engines(&bundle)?, self.width)?)
    }

    fn sharedllm(&mut self, case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = golden::sharedllm::bundle(case, case.weights_path(), quirks, self.target, folder.path())?;
        Ok(golden::sharedllm::graphs(case, &mut self.engines(&bundle)?, quirks, self.width)?)
    }

    fn omits_sharedllm(&self, case: &SharedLlmCase, name: &str) -> bool {
        golden::sharedllm::not_in_graphs(case, name)
    }

    /// ONNX Runtime's attention for CPU takes heads of a multiple of 8; the export refuses others.
    fn supports(&self, case: &HomerCase) -> bool {
        self.target == Target::Portable || case.architecture.head_dim.is_multiple_of(8)
    }

    fn omits(&self, name: &str) -> bool {
        // The graphs mark affixes by their number, and gather what is kept.
        name.ends_with(".in_reduction_mask") || name.ends_with(".prune.remove_idx") || golden::rcc::not_in_graphs(name)
    }
}
