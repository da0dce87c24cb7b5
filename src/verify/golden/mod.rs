//! The reference and the graphs against what the authors' code computed.
//!
//! One module per method: what each side computes of a case, by golden name, and how that is held against the case.

pub mod homer;
pub mod part;
pub mod rcc;
pub mod sharedllm;

use super::error::VerifyError;
use super::judge::{Findings, Judge};
use super::verdict::{Bounds, TapKind, TapResult, Verdict, judge_as};
use crate::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use crate::checkpoint::Checkpoint;
use crate::goldens::{HomerCase, RccCase, SharedLlmCase};
use crate::pipeline::Engines;
use crate::precision::Recipe;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// Tensors by golden name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A golden case of any method.
#[derive(Debug)]
pub enum GoldenCase {
    /// With the plan that the authors' code followed.
    Homer(Box<HomerCase>, Box<HomerPlan>),
    /// One model and its runs.
    Rcc(Box<RccCase>),
    /// One of the two variants.
    SharedLlm(Arc<SharedLlmCase>, Quirks),
}

impl GoldenCase {
    /// Reads the case that `path` belongs to: `homer_<case>.json`, one of RCC's `<case>.config.json`,
    /// `<case>.weights.safetensors` and `<case>.cases.safetensors`, or SharedLLM's `case_<case>.json`, which is one case in two
    /// variants.
    ///
    /// # Errors
    ///
    /// The file is called otherwise, or the case cannot be read.
    pub fn open(path: &Path) -> Result<Vec<Self>, VerifyError> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        if name.starts_with("homer_") && ends(&[".json"]) {
            let case = HomerCase::open(path)?;
            let plan = homer::plan(&case)?;
            Ok(vec![Self::Homer(Box::new(case), Box::new(plan))])
        } else if ends(&[".config.json", ".weights.safetensors", ".cases.safetensors"]) {
            Ok(vec![Self::Rcc(Box::new(RccCase::open(path)?))])
        } else if name.starts_with("case_") && ends(&[".json"]) {
            let case = Arc::new(SharedLlmCase::open(path)?);
            Ok([Quirks::Faithful, Quirks::Fixed].map(|quirks| Self::SharedLlm(Arc::clone(&case), quirks)).into())
        } else {
            Err(VerifyError::NotGolden { path: path.to_owned() })
        }
    }

    /// The method that the case is of.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Homer(..) => "homer",
            Self::Rcc(_) => "rcc",
            Self::SharedLlm(..) => "sharedllm",
        }
    }

    /// What it is called, and the precision of the authors' computation.
    pub fn described(&self) -> String {
        match self {
            Self::Homer(case, _) => format!("{} ({})", case.name, case.dtype),
            Self::Rcc(case) => case.name.clone(),
            Self::SharedLlm(case, _) => case.name.clone(),
        }
    }

    /// Exports the case's model for `target` into `folder`, which has to be there.
    ///
    /// # Errors
    ///
    /// The model cannot be exported, or the folder not be written.
    pub fn bundle(&self, target: Target, folder: &Path) -> Result<Bundle, VerifyError> {
        let recipe = Recipe::fp32();
        match self {
            Self::Homer(case, plan) => homer::bundle(case, plan, target, &recipe, folder),
            Self::Rcc(case) => rcc::bundle(case, target, &recipe, folder),
            Self::SharedLlm(case, quirks) => {
                sharedllm::bundle(case, case.weights_path(), *quirks, target, &recipe, folder)
            }
        }
    }

    /// Compares the reference with the case. Taps are called `reference.` and their golden name.
    ///
    /// # Errors
    ///
    /// The reference cannot be run.
    pub fn compare_reference(&self) -> Result<Findings, VerifyError> {
        match self {
            Self::Homer(case, plan) => Ok(homer::compare("reference", case, plan, &homer::reference(case, plan)?)),
            Self::Rcc(case) => Ok(rcc::compare("reference", case, &rcc::reference(case)?, &|_| false)),
            Self::SharedLlm(case, quirks) => {
                let found = sharedllm::reference(case, *quirks)?;
                sharedllm::compare("reference", case, *quirks, &found, &|_| false)
            }
        }
    }

    /// Compares `engines`, made for a bundle of the case, with it. Taps are called `<name>.` and their golden name.
    ///
    /// # Errors
    ///
    /// A graph cannot be run.
    pub fn compare_engines(
        &self,
        name: &str,
        engines: &mut Engines<'_>,
        width: usize,
    ) -> Result<Findings, VerifyError> {
        match self {
            Self::Homer(case, plan) => {
                Ok(homer::compare(name, case, plan, &homer::graphs(case, plan, engines, width)?))
            }
            Self::Rcc(case) => Ok(rcc::compare(name, case, &rcc::graphs(case, engines, width)?, &rcc::not_in_graphs)),
            Self::SharedLlm(case, quirks) => {
                let found = sharedllm::graphs(case, engines, *quirks, width)?;
                sharedllm::compare(name, case, *quirks, &found, &|tensor| sharedllm::not_in_graphs(case, tensor))
            }
        }
    }
}

/// Writes the folder `checkpoint` of `weights` and the files `described` into `folder`.
///
/// # Errors
///
/// A file cannot be written.
pub fn checkpoint(folder: &Path, weights: &Path, described: &[(&str, Value)]) -> Result<PathBuf, VerifyError> {
    let dir = folder.join("checkpoint");
    std::fs::create_dir(&dir).map_err(failed(&dir))?;
    let file = dir.join("model.safetensors");
    std::fs::copy(weights, &file).map_err(failed(&file))?;
    describe(&dir, described)?;
    Ok(dir)
}

fn describe(dir: &Path, described: &[(&str, Value)]) -> Result<(), VerifyError> {
    for (name, value) in described {
        let file = dir.join(name);
        std::fs::write(&file, value.to_string()).map_err(failed(&file))?;
    }
    Ok(())
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> VerifyError {
    let path = path.to_owned();
    move |source| VerifyError::Io { path, source }
}

/// The checkpoint exported beside itself, as `bundle`.
///
/// # Errors
///
/// As [`export`].
pub fn exported(
    checkpoint: &Path,
    method: MethodSettings,
    target: Target,
    recipe: &Recipe,
) -> Result<Bundle, VerifyError> {
    let out = checkpoint.with_file_name("bundle");
    let options = ExportOptions { method, target, weights: WeightStorage::Link, recipe: recipe.clone(), force: false };
    export(&Checkpoint::open(checkpoint).map_err(Box::new)?, &out, &options)?;
    Ok(Bundle::open(out)?)
}

fn batched(tensor: &Tensor) -> Result<Tensor, TensorError> {
    tensor.reshaped([&[1], tensor.shape()].concat())
}

fn missing(tap: &str) -> VerifyError {
    VerifyError::MissingTap { tap: tap.to_owned() }
}

/// The largest of `logits`, the first of equals.
fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32
}

/// Compares what a side found with golden tensors, one by one.
struct Held<'a> {
    judge: Judge,
    /// What results are called besides their golden name.
    side: &'a str,
    found: &'a Tensors,
}

impl<'a> Held<'a> {
    fn new(side: &'a str, found: &'a Tensors, dtype: DType) -> Self {
        let mut judge = Judge::new(Rc::new(move |_, kind| Bounds::golden(kind, dtype)));
        judge.prefix = format!("{side}.");
        judge.begin(false);
        Self { judge, side, found }
    }

    /// Compares the golden tensor `name`, or what was found of it; the values of both sides go through `form` first.
    fn compare(&mut self, name: &str, expected: &Tensor, form: impl Fn(&Tensor) -> Result<Tensor, TensorError>) {
        let pairs = part::pairs(name, expected, self.found);
        if pairs.is_empty() {
            let name = format!("{}.{name}", self.side);
            self.judge.tell(TapResult::missing(&name, expected.shape(), "what was computed"));
        }
        for (key, expected, found) in pairs {
            // What cannot be formed fails by its shape.
            let [found, expected] = [found, &expected].map(|tensor| form(tensor).unwrap_or_else(|_| tensor.clone()));
            self.judge.compare(key, &found, &expected);
        }
    }

    /// Compares the golden ids `name`, of which number `i` was chosen by the golden logits `logits(i)`. Returns whether another
    /// one was chosen.
    fn compare_ids(&mut self, name: &str, expected: &Tensor, logits: &dyn Fn(usize) -> Option<Vec<f32>>) -> bool {
        let Some(found) = self.found.get(name) else {
            self.compare(name, expected, |tensor| Ok(tensor.clone()));
            return true;
        };
        let result = judge_ids(&format!("{}.{name}", self.side), found, expected, logits);
        let other = result.verdict != Verdict::Pass;
        self.judge.tell(result);
        other
    }
}

/// Ids that are chosen by logits: a different one is ambiguous if its logit is a near-tie with the expected one's.
fn judge_ids(name: &str, found: &Tensor, expected: &Tensor, logits: &dyn Fn(usize) -> Option<Vec<f32>>) -> TapResult {
    let bounds = Bounds::golden(TapKind::Logits, DType::F32);
    let first_other = || {
        let (found, expected) = (found.as_i64().ok()?, expected.as_i64().ok()?);
        let at = found.iter().zip(expected).position(|(found, expected)| found != expected)?;
        let logits = logits(at)?;
        let logit = |id: i64| usize::try_from(id).ok().and_then(|id| logits.get(id)).copied();
        let scores = Tensor::from_f32([1, 2], vec![logit(expected[at])?, logit(found[at])?]).ok()?;
        let choice = |side| Tensor::from_i64([1], vec![side]).ok();
        let result = judge_as(TapKind::Choice, name, &choice(1)?, &choice(0)?, Some(&scores), &bounds);
        Some(TapResult { shape: vec![expected.len()], ..result })
    };
    first_other().unwrap_or_else(|| judge_as(TapKind::Value, name, found, expected, None, &bounds))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn another_id_is_excused_only_within_a_tie() {
        let ids = |ids: &[i64]| Tensor::from_i64([1, ids.len()], ids.to_vec()).unwrap();
        let verdict = |found: &[i64], gap: f32| {
            let logits = move |at: usize| (at == 1).then(|| vec![0.0, 2.0, 2.0 - gap]);
            judge_ids("generated", &ids(found), &ids(&[0, 1, 0]), &logits).verdict
        };
        assert_eq!(verdict(&[0, 1, 0], 1.0), Verdict::Pass);
        assert_eq!(verdict(&[0, 2, 1], 1e-4), Verdict::Ambiguous);
        assert_eq!(verdict(&[0, 2, 1], 1e-2), Verdict::Fail);
        assert_eq!(verdict(&[1, 1, 0], 0.0), Verdict::Fail);
        assert_eq!(verdict(&[0, 1], 0.0), Verdict::Fail);
    }

    #[test]
    fn other_files_are_no_cases() {
        for name in ["config.json", "homer_A.safetensors", "case_q4.safetensors", "/"] {
            let error = GoldenCase::open(Path::new(name)).unwrap_err().to_string();
            assert!(error.contains("homer_<case>.json") && error.contains("case_<case>.json"), "{error}");
        }
    }
}
