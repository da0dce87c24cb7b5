//! The exported graphs as rows of the table: a bundle is written, opened and run, as the command does it.

use super::{Implementation, graphs_sharedllm, rcc_graphs};
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, config_json, sharedllm_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::homer::{Prompt, compress};
use accordion::pipeline::{ContextState, Engines};
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::tensor::Tensor;
use accordion_graphs::blocks::{Target, rope};
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Graphs of one target, with or without our kernels, at one batch width.
pub(crate) struct Graphs {
    name: &'static str,
    target: Target,
    fused_operators: bool,
    width: usize,
}

type Tensors = BTreeMap<String, Tensor>;

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

    /// A case of SharedLLM, with `weights` for its weights, exported inside `folder`.
    pub(crate) fn sharedllm_bundle(
        &self,
        folder: &Path,
        case: &SharedLlmCase,
        weights: &Path,
        quirks: Quirks,
    ) -> Result<Bundle> {
        let settings = case.settings(quirks);
        let config = sharedllm_json(&case.architecture, &case.model, &settings);
        self.bundle(&checkpoint(folder, weights, &config)?, MethodSettings::SharedLlm(settings))
    }

    /// The checkpoint exported beside itself.
    pub(crate) fn bundle(&self, checkpoint: &Path, method: MethodSettings) -> Result<Bundle> {
        let out = checkpoint.with_file_name("bundle");
        let options = ExportOptions { method, target: self.target, weights: WeightStorage::Link, force: false };
        export(&Checkpoint::open(checkpoint)?, &out, &options)?;
        Ok(Bundle::open(out)?)
    }

    pub(crate) fn engines<'b>(&self, bundle: &'b Bundle) -> Result<Engines<'b>> {
        let runtime = load(LoadOptions::fetching(&mut |_| {}))?;
        let options = OrtOptions { fused_operators: self.fused_operators };
        let loader = OrtCpu::new(runtime, bundle.weights().clone(), &options)?;
        Ok(Engines::new(bundle, Box::new(loader)))
    }
}

/// Writes the folder `checkpoint` of `weights` and `config` into `folder`.
pub(crate) fn checkpoint(folder: &Path, weights: &Path, config: &serde_json::Value) -> Result<PathBuf> {
    let checkpoint = folder.join("checkpoint");
    std::fs::create_dir(&checkpoint)?;
    std::fs::copy(weights, checkpoint.join("model.safetensors"))?;
    std::fs::write(checkpoint.join("config.json"), config.to_string())?;
    Ok(checkpoint)
}

impl Implementation for Graphs {
    fn name(&self) -> &'static str {
        self.name
    }

    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let checkpoint = checkpoint(folder.path(), case.weights_path(), &config_json(&case.architecture))?;
        let tree_heights = vec![plan.tree_height];
        let method = MethodSettings::Homer { settings: case.settings, tree_heights, significance: None };
        let bundle = self.bundle(&checkpoint, method)?;
        let mut engines = self.engines(&bundle)?;

        let mut found = Tensors::new();
        let (frequencies, _) = rope::frequencies(&case.architecture.rope, case.architecture.head_dim);
        let frequencies: Vec<f32> = frequencies.into_iter().map(|f| f as f32).collect();
        found.insert("rope.inv_freq".into(), Tensor::from_f32([frequencies.len()], frequencies)?);
        let prompt = Prompt { prefix: &case.prefix_ids, context: &case.context_ids, suffix: &case.suffix_ids };
        let bias: Vec<&[f32]> = case.bias.iter().map(Vec::as_slice).collect();
        let state = compress(&mut engines, plan, prompt, &bias, self.width, &mut found, &mut |_| {})?;
        found.insert("prefix.last_position_id".into(), Tensor::from_i64([1], vec![state.last_position])?);
        teacher(case, &mut engines, &state, &mut found)?;
        generate(case, &mut engines, &state, &mut found)?;
        without_homer(case, &mut engines, &mut found)?;
        Ok(found)
    }

    fn rcc(&mut self, case: &RccCase) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let checkpoint = rcc_graphs::checkpoint(case, folder.path())?;
        let bundle = self.bundle(&checkpoint, MethodSettings::Rcc(case.settings))?;
        rcc_graphs::run(case, &mut self.engines(&bundle)?, self.width)
    }

    fn sharedllm(&mut self, case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
        let folder = tempfile::tempdir()?;
        let bundle = self.sharedllm_bundle(folder.path(), case, case.weights_path(), quirks)?;
        graphs_sharedllm::run(case, &mut self.engines(&bundle)?, quirks, self.width)
    }

    fn omits_sharedllm(&self, case: &SharedLlmCase, name: &str) -> bool {
        graphs_sharedllm::omits(case, name)
    }

    /// ONNX Runtime's attention for CPU takes heads of a multiple of 8; the export refuses others.
    fn supports(&self, case: &HomerCase) -> bool {
        self.target == Target::Portable || case.architecture.head_dim.is_multiple_of(8)
    }

    fn omits(&self, name: &str) -> bool {
        // The graphs mark affixes by their number, and gather what is kept.
        name.ends_with(".in_reduction_mask") || name.ends_with(".prune.remove_idx") || rcc_graphs::omits(name)
    }
}

fn teacher(case: &HomerCase, engines: &mut Engines<'_>, state: &ContextState, found: &mut Tensors) -> Result<()> {
    let count = case.teacher_ids.len();
    let mut at_once = Sequence::continue_from(engines, state, count, Continuation::Next)?;
    let positions: Vec<i64> = (at_once.next_position()..).take(count).collect();
    found.insert("teacher.position_ids".into(), Tensor::from_i64([count], positions)?);
    found.insert("teacher.logits".into(), at_once.forward(engines, &case.teacher_ids, count)?);

    // Without reserved room the cache has to grow on the way.
    let mut stepwise = Sequence::continue_from(engines, state, 0, Continuation::Next)?;
    let mut rows = Vec::new();
    for &id in &case.teacher_ids {
        rows.extend(stepwise.forward(engines, &[id], 1)?.to_f32());
    }
    found.insert("teacher_step.logits".into(), Tensor::from_f32([count, case.architecture.vocab_size], rows)?);
    Ok(())
}

fn generate(case: &HomerCase, engines: &mut Engines<'_>, state: &ContextState, found: &mut Tensors) -> Result<()> {
    let argmax = |logits: &[f32]| (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    let steps = case.generate_steps;
    let mut sequence = Sequence::continue_from(engines, state, steps, Continuation::OffByOne)?;
    let mut tokens = vec![argmax(&state.logits) as i64];
    let mut positions = Vec::new();
    let mut step_logits = Vec::new();
    for step in 0..steps {
        positions.push(sequence.next_position());
        let logits = sequence.forward(engines, &[tokens[step] as u32], 1)?.to_f32();
        tokens.push(argmax(&logits) as i64);
        step_logits.extend(logits);
    }
    found.insert("generate.tokens".into(), Tensor::from_i64([steps + 1], tokens)?);
    found.insert("generate.position_ids".into(), Tensor::from_i64([steps], positions)?);
    found.insert("generate.step_logits".into(), Tensor::from_f32([steps, case.architecture.vocab_size], step_logits)?);
    for (layer, cache) in sequence.cache()?.into_iter().enumerate() {
        for (part, tensor) in ["k", "v"].iter().zip(cache) {
            let shape = tensor.shape()[1..].to_vec();
            found.insert(format!("generate.cache.{part}.{layer}"), tensor.reshaped(shape)?);
        }
    }
    Ok(())
}

fn without_homer(case: &HomerCase, engines: &mut Engines<'_>, found: &mut Tensors) -> Result<()> {
    let Some(rows) = case.expected.get("plain.logits").map(|expected| expected.shape()[0]) else { return Ok(()) };
    let ids = [&case.prefix_ids[..], &case.context_ids, &case.suffix_ids].concat();
    let mut sequence = Sequence::new(engines, ids.len())?;
    found.insert("plain.logits".into(), sequence.forward(engines, &ids, rows)?);
    Ok(())
}
