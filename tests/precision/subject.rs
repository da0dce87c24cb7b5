//! Models and prompts of golden cases, exported in any precision.

use super::ranges::range_table;
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::precision::Recipe;
use accordion::verify::bundle::{Input, Plan};
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks};
use accordion_graphs::precision::Precision;
use std::cell::OnceCell;
use std::path::{Path, PathBuf};

/// Tokens that both sides are fed behind the prompt.
const TEACHER: [u32; 4] = [5, 9, 3, 11];

/// One model, what a method does to one prompt, and a place for bundles.
pub(super) struct Subject {
    pub(super) name: String,
    folder: tempfile::TempDir,
    method: MethodSettings,
    plan: Plan,
    lengths: PromptLengths,
    ids: Vec<u32>,
    /// Whether its graphs for ONNX Runtime's CPU provider are checked as well, one case of every method and family: its
    /// attention does not take heads of every width.
    ort_cpu: bool,
    ranges: OnceCell<PathBuf>,
}

fn goldens(method: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(method)
}

/// A plain model, and every golden case.
pub(super) fn subjects() -> Vec<Subject> {
    let mut subjects = vec![plain("C"), homer("C")];
    subjects.extend(["neox_r32", "qwen2_r8", "mamba_pairs"].map(rcc));
    subjects.push(sharedllm("q4"));
    let more = ["D", "E", "F", "G"].map(homer).into_iter().chain(["far10", "lm3", "mask4"].map(sharedllm));
    subjects.extend(more.map(|subject| Subject { ort_cpu: false, ..subject }));
    subjects
}

/// A case of every method.
pub(super) fn one_of_each() -> [Subject; 4] {
    [plain("C"), homer("C"), rcc("neox_r32"), sharedllm("q4")]
}

pub(super) fn plain(name: &str) -> Subject {
    let homer = homer(name);
    let Plan::Homer(plan, _) = &homer.plan else { panic!("the case is HOMER's") };
    let context = plan.lengths.total().min(48);
    let lengths = PromptLengths { prefix: 0, context, suffix: 0 };
    let ids = [&homer.ids[..context], &TEACHER].concat();
    let name = format!("plain {name}");
    Subject { name, method: MethodSettings::Plain, plan: Plan::Plain, lengths, ids, ..homer }
}

fn homer(name: &str) -> Subject {
    let case = HomerCase::open(&goldens("homer").join(format!("homer_{name}.json"))).unwrap();
    let plan = golden::homer::plan(&case).unwrap();
    let folder = tempfile::tempdir().unwrap();
    golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
    let method =
        MethodSettings::Homer { settings: case.settings, tree_heights: vec![plan.tree_height], significance: None };
    Subject {
        name: format!("homer {name}"),
        folder,
        method,
        lengths: plan.lengths,
        plan: Plan::Homer(plan, case.bias.clone()),
        ids: [&case.prefix_ids[..], &case.context_ids, &case.suffix_ids, &TEACHER].concat(),
        ort_cpu: case.architecture.head_dim.is_multiple_of(8),
        ranges: OnceCell::new(),
    }
}

fn rcc(name: &str) -> Subject {
    let case = RccCase::open(&goldens("rcc").join(format!("{name}.cases.safetensors"))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    golden::rcc::bundle(&case, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
    let plans = case.runs.iter().map(|run| (run, RccPlan::new(run.lengths(), case.settings).unwrap()));
    let (run, plan) = plans.into_iter().find(|(_, plan)| plan.segments > 1).unwrap();
    Subject {
        name: format!("rcc {name}"),
        folder,
        method: MethodSettings::Rcc(case.settings),
        lengths: plan.lengths,
        plan: Plan::Rcc(plan),
        ids: [&run.text_ids[..], &run.prompt_ids, &TEACHER].concat(),
        ort_cpu: true,
        ranges: OnceCell::new(),
    }
}

fn sharedllm(name: &str) -> Subject {
    let case = SharedLlmCase::open(&goldens("sharedllm").join(format!("case_{name}.json"))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plan = golden::sharedllm::plan(&case, Quirks::Faithful).unwrap();
    golden::sharedllm::bundle(
        &case,
        case.weights_path(),
        Quirks::Faithful,
        Target::Portable,
        &Recipe::fp32(),
        folder.path(),
    )
    .unwrap();
    Subject {
        name: format!("sharedllm {name}"),
        folder,
        method: MethodSettings::SharedLlm(case.settings(Quirks::Faithful)),
        lengths: PromptLengths { prefix: 0, context: case.context_ids.len(), suffix: case.running_ids.len() },
        plan: Plan::SharedLlm(plan),
        ids: [&case.context_ids[..], &case.running_ids, &TEACHER].concat(),
        ort_cpu: true,
        ranges: OnceCell::new(),
    }
}

impl Subject {
    pub(super) fn supports(&self, target: Target) -> bool {
        target == Target::Portable || self.ort_cpu
    }

    pub(super) fn input(&self) -> Input<'_> {
        Input { plan: &self.plan, lengths: self.lengths, ids: &self.ids, width: 1 }
    }

    /// What its method does to the prompt, and the prompt.
    pub(super) fn compression(&self) -> (Compression, PromptIds) {
        let compression = match &self.plan {
            Plan::Plain => Compression::Plain { allow_overlong: true },
            Plan::Homer(plan, _) => {
                let significance = Some(Significance::Uncalibrated);
                Compression::Homer(Homer { settings: plan.settings, significance, width: 1 })
            }
            Plan::Rcc(plan) => Compression::Rcc(Rcc { settings: plan.settings, width: 1 }),
            Plan::SharedLlm(plan) => {
                let policy = ChunkPolicy::Chunks(plan.chunks);
                Compression::SharedLlm(SharedLlm { settings: plan.settings, policy, width: 1 })
            }
        };
        let (prefix, rest) = self.ids.split_at(self.lengths.prefix);
        let (context, rest) = rest.split_at(self.lengths.context);
        let [prefix, context, suffix] = [prefix, context, &rest[..self.lengths.suffix]].map(<[u32]>::to_vec);
        (compression, PromptIds { prefix, context, suffix })
    }

    /// How to export in `precision`, calibrated on the very prompt where it needs to be.
    pub(super) fn recipe(&self, precision: Precision) -> Recipe {
        let mut recipe = Recipe::of(precision);
        if precision.needs_ranges() {
            recipe.ranges = Some(self.ranges.get_or_init(|| self.calibrated()).clone());
        }
        recipe
    }

    pub(super) fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(self.folder.path().join("checkpoint")).unwrap()
    }

    pub(super) fn exported(&self, recipe: Recipe, target: Target) -> Bundle {
        let checkpoint = self.checkpoint();
        let out = self.folder.path().join(format!("{}-{target:?}", recipe.precision));
        let method = self.method.clone();
        let options = ExportOptions { method, target, weights: WeightStorage::Link, recipe, force: true };
        export(&checkpoint, &out, &options).unwrap();
        Bundle::open(out).unwrap()
    }

    fn calibrated(&self) -> PathBuf {
        let path = self.folder.path().join("ranges.safetensors");
        range_table(&self.exported(Recipe::fp32(), Target::Portable), &self.input()).save(&path).unwrap();
        path
    }
}
