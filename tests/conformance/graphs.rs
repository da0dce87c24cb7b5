//! The exported graphs as rows of the table: a bundle is written, opened and run, as the command does it.

use super::Implementation;
use super::compare::Tensors;
use accordion::bundle::Bundle;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::Engines;
use accordion::precision::Recipe;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use anyhow::Result;

/// Graphs of one target in one precision, with or without our kernels, at one batch width.
pub(crate) struct Graphs {
    name: &'static str,
    pub(crate) target: Target,
    fused_operators: bool,
    width: usize,
    pub(crate) recipe: Recipe,
}

impl Graphs {
    /// In every precision.
    pub(crate) fn all() -> Vec<Self> {
        let of = |precision, emulated, (name, target, fused_operators, width)| {
            let recipe = Recipe { emulated, ..Recipe::of(precision) };
            Self { name, target, fused_operators, width, recipe }
        };
        let sixteen_bits = [
            of(Precision::Fp16, false, ("portable fp16", Target::Portable, false, usize::MAX)),
            of(Precision::Fp16, true, ("portable fp16, emulated", Target::Portable, false, 1)),
            of(Precision::Bf16, true, ("portable bf16, emulated", Target::Portable, false, usize::MAX)),
            of(Precision::Fp16, false, ("ort-cpu fp16 fused", Target::OrtCpu, true, usize::MAX)),
            of(Precision::Bf16, false, ("ort-cpu bf16 fused", Target::OrtCpu, true, usize::MAX)),
        ];
        Self::single().into_iter().chain(sixteen_bits).collect()
    }

    /// In single precision.
    pub(crate) fn single() -> Vec<Self> {
        let row = |name, target, fused_operators, width| {
            let recipe = Recipe::fp32();
            Self { name, target, fused_operators, width, recipe }
        };
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

    fn dtype(&self) -> DType {
        match self.recipe.precision {
            Precision::Fp16 => DType::F16,
            Precision::Bf16 => DType::Bf16,
            _ => DType::F32,
        }
    }

    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = golden::homer::bundle(case, plan, self.target, &self.recipe, folder.path())?;
        Ok(golden::homer::graphs(case, plan, &mut self.engines(&bundle)?, self.width)?)
    }

    fn rcc(&mut self, case: &RccCase) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = golden::rcc::bundle(case, self.target, &self.recipe, folder.path())?;
        Ok(golden::rcc::graphs(case, &mut self.engines(&bundle)?, self.width)?)
    }

    fn sharedllm(&mut self, case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let (weights, recipe) = (case.weights_path(), &self.recipe);
        let bundle = golden::sharedllm::bundle(case, weights, quirks, self.target, recipe, folder.path())?;
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
