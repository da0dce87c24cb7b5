//! Faults in bundles of RCC and SharedLLM that are not fp32.

use super::compressors::{FORMS, frequencies, goldens, none};
use super::faults::Fault;
use super::faulty_runtime;
use super::quantized::{Plant, check, in_a_matrix};
use accordion::bisect::by_part::first_wrong;
use accordion::bisect::case::Visit;
use accordion::bisect::culprit::Found;
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::terms::Terms;
use accordion::bisect::{BisectError, cumulative, rcc, sharedllm};
use accordion::bundle::Bundle;
use accordion::checkpoint::CheckpointError;
use accordion::goldens::{RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::reference::quantize::Weight;
use accordion::reference::rcc::Rcc;
use accordion::reference::sharedllm::SharedLlm;
use accordion::verify::quantized::weights_of;
use accordion::verify::rcc::RccInput;
use accordion::verify::sharedllm::SharedLlmInput;
use accordion::verify::verdict::Verdict;
use accordion::verify::{Detail, golden};
use accordion_graphs::architecture::{Architecture, Llama};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ops::ControlFlow;
use tempfile::TempDir;

/// A precision, and whether graphs round to it in a runtime that cannot compute in it.
const PRECISIONS: [(Precision, bool); 4] = [
    (Precision::WeightInt8, false),
    (Precision::Int8PerToken, false),
    (Precision::Fp16, true),
    (Precision::WeightInt4, false),
];

/// A case of the authors.
enum Case {
    Rcc(Box<RccCase>),
    SharedLlm(Box<SharedLlmCase>),
}

/// Where a reference finds its weights.
type Source<'a> = &'a dyn Fn(&str) -> Result<Weight, CheckpointError>;

impl Case {
    fn all() -> [Self; 2] {
        [
            Self::Rcc(Box::new(RccCase::open(&goldens("rcc/qwen2_r8.config.json")).unwrap())),
            Self::SharedLlm(Box::new(SharedLlmCase::open(&goldens("sharedllm/case_q4.json")).unwrap())),
        ]
    }

    fn bundle(&self, target: Target, recipe: &Recipe, folder: &TempDir) -> Bundle {
        match self {
            Self::Rcc(case) => golden::rcc::bundle(case, target, recipe, folder.path()),
            Self::SharedLlm(case) => {
                golden::sharedllm::bundle(case, case.weights_path(), Quirks::Fixed, target, recipe, folder.path())
            }
        }
        .unwrap()
    }

    fn decoder(&self) -> &Llama {
        match self {
            Self::Rcc(case) => match &case.decoder {
                Architecture::Llama(llama) => llama,
                _ => panic!("the case has another decoder"),
            },
            Self::SharedLlm(case) => &case.architecture,
        }
    }

    fn cases(
        &self,
        rebuilt: &Rebuilt<'_>,
        source: Source<'_>,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, BisectError> {
        match self {
            Self::Rcc(case) => {
                let reference = Rcc::load(&case.decoder, &case.model, case.settings, source).unwrap();
                let plans = case.runs.iter().map(|run| (run, RccPlan::new(run.lengths(), case.settings).unwrap()));
                let (run, plan) = plans.into_iter().find(|(_, plan)| plan.segments > 1).unwrap();
                let input = RccInput { plan: &plan, text: &run.text_ids, prompt: &run.prompt_ids, teacher: &[] };
                rcc::cases(rebuilt, &reference, &input, visit)
            }
            Self::SharedLlm(case) => {
                let reference = SharedLlm::load(&case.architecture, &case.model, source).unwrap();
                let plan = golden::sharedllm::plan(case, Quirks::Fixed).unwrap();
                let (context, running) = (&case.context_ids[..], &case.running_ids[..]);
                let input = SharedLlmInput { plan: &plan, context, running, teacher: &[], width: 1 };
                sharedllm::cases(rebuilt, &reference, &input, visit)
            }
        }
    }
}

/// A bundle of a case, and what runs its graphs.
struct Subject<'c> {
    case: &'c Case,
    bundle: Bundle,
    fused: bool,
    what: String,
    _folder: TempDir,
}

impl<'c> Subject<'c> {
    fn new(case: &'c Case, (precision, emulated): (Precision, bool), (target, fused): (Target, bool)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let emulated = emulated && target == Target::Portable;
        let bundle = case.bundle(target, &Recipe { emulated, ..Recipe::of(precision) }, &folder);
        let method = if matches!(case, Case::Rcc(_)) { "rcc" } else { "sharedllm" };
        Self { case, bundle, fused, what: format!("{method}, {precision}, {target:?}, fused {fused}"), _folder: folder }
    }

    fn all(cases: &'c [Case]) -> impl Iterator<Item = Self> {
        let of_case = |case| PRECISIONS.into_iter().flat_map(move |p| FORMS.map(|form| (case, p, form)));
        cases.iter().flat_map(of_case).map(|(case, precision, form)| Self::new(case, precision, form))
    }

    fn loader(&self, plant: &Plant) -> super::FaultyRuntime {
        let nothing = none();
        let fault = if let Plant::Runtime(fault) = plant { fault } else { &nothing };
        let llama = self.case.decoder();
        faulty_runtime(&self.bundle, fault, self.fused, frequencies(&llama.rope, llama.head_dim))
    }

    fn find(&self, plant: &Plant) -> Option<Found> {
        let sound = weights_of(&self.bundle);
        let planted = |name: &str| sound(name).map(|weight| plant.in_matrix(name, weight));
        let rebuilt = Rebuilt::new(&self.bundle).unwrap();
        let terms = Terms::over(&self.bundle, planted);
        let cases = |visit: &mut Visit<'_>| self.case.cases(&rebuilt, &planted, visit);
        first_wrong(&self.loader(plant), &terms, &mut |_| {}, cases).unwrap()
    }

    /// A random fault in a matrix, or in how a graph is run.
    fn plant(&self, random: &mut ChaCha8Rng) -> Plant {
        let mut pick = |n: usize| random.next_u32() as usize % n;
        if pick(4) == 0 {
            let layer = pick(self.case.decoder().num_layers);
            return Plant::Runtime(match pick(2) {
                0 => Fault::Scale(format!("model.layers.{layer}.self_attn")),
                _ => Fault::Epsilon(format!("model.layers.{layer}.input_layernorm")),
            });
        }
        in_a_matrix(&self.bundle, &mut pick)
    }
}

#[test]
fn faults_in_compressors_are_found_in_every_precision() {
    let mut random = ChaCha8Rng::seed_from_u64(31);
    for subject in Subject::all(&Case::all()) {
        for _ in 0..2 {
            let plant = subject.plant(&mut random);
            check(&format!("{plant:?} in {}", subject.what), &plant, subject.find(&plant).as_ref());
        }
    }
}

#[test]
fn nothing_is_found_in_sound_compressors() {
    for subject in Subject::all(&Case::all()) {
        let rebuilt = Rebuilt::new(&subject.bundle).unwrap();
        let sound = weights_of(&subject.bundle);
        let (loader, terms) = (subject.loader(&Plant::Nothing), Terms::of(&subject.bundle));
        let cases = |visit: &mut Visit<'_>| subject.case.cases(&rebuilt, &sound, visit);
        let findings = cumulative::compare(&loader, &terms, Detail::All, &mut |_| {}, cases).unwrap();
        let wrong = findings.taps.iter().filter(|tap| tap.verdict != Verdict::Pass);
        let wrong: Vec<String> = wrong.map(|tap| format!("{}: {}", tap.name, tap.reason)).collect();
        assert!(wrong.is_empty(), "{}: {wrong:#?}", subject.what);
        let linears = findings.taps.iter().filter(|tap| tap.name.starts_with("linears.")).count();
        assert!(linears >= 7 * subject.case.decoder().num_layers, "{}: {linears}", subject.what);
    }
}
