//! Faults in bundles that are not fp32: in the numbers of their matrices, and in what the runtime makes of their graphs. The
//! reference rounds as the bundle does.

use super::faults::{Fault, Frequencies};
use super::{LENGTHS, Laboratory, SETTINGS, architecture, bias, faulty_runtime, token_ids};
use accordion::bisect::by_part::first_wrong;
use accordion::bisect::case::Visit;
use accordion::bisect::culprit::{Found, Origin};
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::terms::Terms;
use accordion::bisect::{BisectError, bundle, cumulative, reproducer};
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::pipeline::Engines;
use accordion::precision::Recipe;
use accordion::reference::llama::Llama as Reference;
use accordion::reference::quantize::{Numbers, Rounding, Weight};
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::tensor::Tensor;
use accordion::verify::bundle::{Input, Plan, engine_parts, reference_parts};
use accordion::verify::lockstep::against_reference;
use accordion::verify::parts::Parts;
use accordion::verify::quantized::weights_of;
use accordion::verify::verdict::Verdict;
use accordion::verify::{Detail, Findings};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::precision::Precision;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;

#[path = "../precision/ranges.rs"]
mod ranges;

/// A precision, and whether graphs round to it in a runtime that cannot compute in it.
const PRECISIONS: [(Precision, bool); 5] = [
    (Precision::WeightInt8, false),
    (Precision::Int8, false),
    (Precision::Int8PerToken, false),
    (Precision::Fp16, true),
    (Precision::WeightInt4, false),
];

/// What runs a graph, and of which method.
#[derive(Debug, Clone, Copy)]
struct Form {
    homer: bool,
    target: Target,
    fused: bool,
}

const FORMS: [Form; 4] = [
    Form { homer: false, target: Target::Portable, fused: false },
    Form { homer: true, target: Target::Portable, fused: false },
    Form { homer: false, target: Target::OrtCpu, fused: true },
    Form { homer: true, target: Target::OrtCpu, fused: true },
];

/// Something that can be wrong with the numbers of a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Damage {
    /// All scales are off by 2 %.
    Scale,
    /// That of one row is.
    RowScale,
    /// The scale of one row is where another's should be.
    Transposed,
    /// A block of entries is off by a few steps.
    Block,
    /// What activations count in units of is off by 2 %.
    InputScale,
}

const DAMAGES: [Damage; 5] = [Damage::Scale, Damage::RowScale, Damage::Transposed, Damage::Block, Damage::InputScale];

impl Damage {
    /// `weight` with it; `None` where the matrix cannot have it.
    fn of(self, weight: &Weight) -> Option<Weight> {
        let &[rows, columns] = weight.tensor.shape() else { return None };
        let numbers = weight.tensor.to_f32();
        let peak = |row: usize| numbers[row * columns..][..columns].iter().fold(0.0_f32, |most, w| most.max(w.abs()));
        let mut rounding = weight.rounding.clone();
        if self == Self::InputScale {
            let Numbers::Int8(scale) = rounding.as_ref()?.numbers else { return None };
            rounding = rounding.map(|rounding| Rounding { numbers: Numbers::Int8(scale * 1.02), ..rounding });
        }
        let step = peak(5) / 127.0;
        let changed = |(i, w): (usize, &f32)| {
            let (row, column) = (i / columns, i % columns);
            match self {
                Self::Scale => w * 1.02,
                Self::RowScale if row == 3 => w * 1.02,
                Self::Transposed => w / peak(row) * peak(column % rows),
                Self::Block if (4..12).contains(&row) && (8..16).contains(&column) => w + 4.0 * step,
                _ => *w,
            }
        };
        let numbers = numbers.iter().enumerate().map(changed).collect();
        Some(Weight { tensor: Tensor::from_f32([rows, columns], numbers).unwrap(), rounding })
    }
}

/// What is wrong.
#[derive(Debug, Clone)]
pub(super) enum Plant {
    Nothing,
    Matrix(String, Damage),
    Runtime(Fault),
}

impl Plant {
    /// The matrix `name`, which is `weight` where nothing is wrong.
    pub(super) fn in_matrix(&self, name: &str, weight: Weight) -> Weight {
        match self {
            Self::Matrix(matrix, damage) if matrix == name => damage.of(&weight).unwrap(),
            _ => weight,
        }
    }
}

fn engines(bundle: &Bundle, fused_operators: bool) -> Engines<'_> {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let loader = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators }).unwrap();
    Engines::new(bundle, Box::new(loader))
}

fn compare_whole(engines: &mut Engines<'_>, input: Input<'_>, detail: Detail) -> Findings {
    let bundle = engines.bundle();
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(bundle, &input, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, &input, parts, &mut |_| {}))
        .unwrap()
}

/// The checkpoint of the fp32 tests, and the ranges of its activations.
struct QuantizedLaboratory {
    laboratory: Laboratory,
    ranges: PathBuf,
}

impl QuantizedLaboratory {
    fn new() -> Self {
        let laboratory = Laboratory::new();
        let ranges = laboratory.folder.path().join("ranges.safetensors");
        let this = Self { laboratory, ranges };
        let fp32 = this.export(FORMS[0], Recipe::fp32(), "fp32");
        let ids = token_ids();
        let lengths = PromptLengths { prefix: 0, context: 48, suffix: 0 };
        let input = Input { plan: &Plan::Plain, lengths, ids: &ids[..48], width: 1 };
        ranges::range_table(&fp32, &input).save(&this.ranges).unwrap();
        this
    }

    fn export(&self, form: Form, recipe: Recipe, name: &str) -> Bundle {
        let method = if form.homer {
            MethodSettings::Homer { settings: SETTINGS, tree_heights: vec![2], significance: None }
        } else {
            MethodSettings::Plain
        };
        let out = self.laboratory.folder.path().join(name);
        let weights = WeightStorage::Link;
        let options = ExportOptions { method, target: form.target, weights, recipe, force: true };
        export(&self.laboratory.good, &out, &options).unwrap();
        Bundle::open(out).unwrap()
    }

    fn bundle(&self, form: Form, (precision, emulated): (Precision, bool)) -> Bundle {
        let mut recipe = Recipe::of(precision);
        recipe.emulated = emulated && form.target == Target::Portable;
        recipe.ranges = precision.needs_ranges().then(|| self.ranges.clone());
        self.export(form, recipe, &format!("{precision} {form:?}"))
    }
}

/// Whatever looks at the cases of `form`.
fn with_cases<T>(
    bundle: &Bundle,
    form: Form,
    plant: &Plant,
    look: impl FnOnce(&Rebuilt<'_>, &Terms<'_>, &dyn Fn(&mut Visit<'_>) -> Result<ControlFlow<()>, BisectError>) -> T,
) -> T {
    let sound = weights_of(bundle);
    let planted = move |name: &str| sound(name).map(|weight| plant.in_matrix(name, weight));
    let reference = Reference::load(&architecture(), planted.clone()).unwrap();
    let rebuilt = Rebuilt::new(bundle).unwrap();
    let terms = Terms::over(bundle, planted);
    look(&rebuilt, &terms, &|visit| super::cases(&rebuilt, &reference, form.homer, visit))
}

fn loader(bundle: &Bundle, form: Form, plant: &Plant) -> super::FaultyRuntime {
    // An epsilon of a layer there is none of.
    let none = Fault::Epsilon("model.layers.99.input_layernorm".to_owned());
    let fault = if let Plant::Runtime(fault) = plant { fault } else { &none };
    let llama = architecture();
    faulty_runtime(bundle, fault, form.fused, Frequencies::new(llama.rope.theta, llama.head_dim))
}

fn find(bundle: &Bundle, form: Form, plant: &Plant) -> Option<Found> {
    let loader = loader(bundle, form, plant);
    with_cases(bundle, form, plant, |_, terms, cases| first_wrong(&loader, terms, &mut |_| {}, cases).unwrap())
}

pub(super) fn check(what: &str, plant: &Plant, found: Option<&Found>) {
    let Some(found) = found else { panic!("{what}: nothing found") };
    let culprit = &found.culprit;
    let summary = reproducer::summary(culprit);
    assert_eq!(culprit.origin, Origin::Nodes, "{what}:\n{summary}");
    match plant {
        Plant::Nothing => panic!("{what}:\n{summary}"),
        Plant::Matrix(matrix, _) => {
            assert_eq!(culprit.matrix.as_ref(), Some(matrix), "{what}:\n{summary}");
            // The matrix of a layer names its module; a head that is not one of its own shares the embedding's.
            let module = matrix.strip_suffix(".weight").unwrap();
            assert!(culprit.modules.iter().all(|known| known.starts_with(module)), "{what}:\n{summary}");
        }
        Plant::Runtime(fault) => {
            assert_eq!(culprit.matrix, None, "{what}:\n{summary}");
            assert!(culprit.modules.contains(&fault.module()), "{what}:\n{summary}");
            assert!(culprit.modules.len() <= 3, "{what}:\n{summary}");
        }
    }
}

/// A fault in the matrix of one of a bundle's linear layers that are not in fp32; `pick` chooses among so many.
pub(super) fn in_a_matrix(bundle: &Bundle, pick: &mut dyn FnMut(usize) -> usize) -> Plant {
    let source = weights_of(bundle);
    let layers = bundle.manifest().graphs.values().flat_map(|graph| &graph.signature.quantized);
    let matrices: BTreeSet<&String> = layers.map(|layer| &layer.matrix).collect();
    let mut can_have: Vec<(String, Damage)> = Vec::new();
    for name in matrices.into_iter().filter(|name| name.contains("_proj")) {
        let weight = source(name).unwrap();
        let damages = DAMAGES.into_iter().filter(|damage| damage.of(&weight).is_some());
        can_have.extend(damages.map(|damage| (name.clone(), damage)));
    }
    let (matrix, damage) = can_have.swap_remove(pick(can_have.len()));
    Plant::Matrix(matrix, damage)
}

/// One of the faults that a bundle can have, at a random place of it.
fn plant(bundle: &Bundle, kind: usize, random: &mut ChaCha8Rng) -> Plant {
    let mut pick = |n: usize| random.next_u32() as usize % n;
    let layer = pick(architecture().num_layers);
    match kind % 7 {
        5 => Plant::Runtime(Fault::Scale(format!("model.layers.{layer}.self_attn"))),
        6 => Plant::Runtime(Fault::Epsilon(format!("model.layers.{layer}.input_layernorm"))),
        _ => in_a_matrix(bundle, &mut pick),
    }
}

#[test]
fn planted_faults_are_found_in_every_precision() {
    let laboratory = QuantizedLaboratory::new();
    let mut random = ChaCha8Rng::seed_from_u64(20);
    for (p, precision) in PRECISIONS.into_iter().enumerate() {
        for (f, form) in FORMS.into_iter().enumerate() {
            let bundle = laboratory.bundle(form, precision);
            for i in 0..2 {
                let plant = plant(&bundle, p + 3 * f + 2 * i, &mut random);
                let what = format!("{plant:?} in {} {form:?}", precision.0);
                check(&what, &plant, find(&bundle, form, &plant).as_ref());
            }
        }
    }
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let laboratory = QuantizedLaboratory::new();
    for precision in PRECISIONS {
        for form in FORMS {
            let bundle = laboratory.bundle(form, precision);
            let loader = loader(&bundle, form, &Plant::Nothing);
            let findings = with_cases(&bundle, form, &Plant::Nothing, |_, terms, cases| {
                cumulative::compare(&loader, terms, Detail::All, &mut |_| {}, cases).unwrap()
            });
            let wrong: Vec<String> = findings
                .taps
                .iter()
                .filter(|tap| tap.verdict != Verdict::Pass)
                .map(|tap| format!("{}: {}", tap.name, tap.reason))
                .collect();
            assert!(wrong.is_empty(), "{} {form:?}: {wrong:#?}", precision.0);
            // Every linear layer once, however many nodes a tree has.
            let linears = findings.taps.iter().filter(|tap| tap.name.starts_with("linears.")).count();
            assert!(linears >= 7 * architecture().num_layers, "{} {form:?}: {linears}", precision.0);
        }
    }
}

/// Two matrices that are wrong show as two; what follows from them does not.
#[test]
fn part_by_part_every_wrong_matrix_shows() {
    let laboratory = QuantizedLaboratory::new();
    for form in [FORMS[0], FORMS[3]] {
        let bundle = laboratory.bundle(form, (Precision::Int8PerToken, false));
        let matrix = "model.layers.1.mlp.gate_proj.weight";
        let plant = Plant::Matrix(matrix.to_owned(), Damage::RowScale);
        let loader = loader(&bundle, form, &plant);
        let findings = with_cases(&bundle, form, &plant, |_, terms, cases| {
            cumulative::compare(&loader, terms, Detail::All, &mut |_| {}, cases).unwrap()
        });
        let wrong = findings.taps.iter().filter(|tap| tap.verdict == Verdict::Fail && tap.name.starts_with("linears."));
        let wrong: Vec<&str> = wrong.map(|tap| tap.name.as_str()).collect();
        assert!(!wrong.is_empty() && wrong.iter().all(|name| name.ends_with(matrix)), "{form:?}: {wrong:?}");
    }
}

/// What is bisected by a bundle's own weights is what the command does.
#[test]
fn a_bundle_agrees_with_its_own_weights() {
    let laboratory = QuantizedLaboratory::new();
    let ids = token_ids();
    let plan = HomerPlan::new(architecture().num_layers, LENGTHS, SETTINGS).unwrap();
    let bias = bias(&plan);
    let plan = Plan::Homer(plan, bias);
    let input = Input { plan: &plan, lengths: LENGTHS, ids: &ids, width: 1 };
    let form = FORMS[1];
    let bundle = laboratory.bundle(form, (Precision::Int8, false));
    let rebuilt = Rebuilt::new(&bundle).unwrap();
    let terms = Terms::of(&bundle);
    let sound = loader(&bundle, form, &Plant::Nothing);
    let all = |visit: &mut Visit<'_>| bundle::cases(&rebuilt, &input, visit);
    assert!(first_wrong(&sound, &terms, &mut |_| {}, all).unwrap().is_none());
    let plant = Plant::Runtime(Fault::Scale("model.layers.4.self_attn".to_owned()));
    let faulty = loader(&bundle, form, &plant);
    let all = |visit: &mut Visit<'_>| bundle::cases(&rebuilt, &input, visit);
    check("HOMER in int8", &plant, first_wrong(&faulty, &terms, &mut |_| {}, all).unwrap().as_ref());
}

/// A reproducer of the damage to a matrix, beside the laboratory's other files.
fn reproduced(laboratory: &QuantizedLaboratory, precision: (Precision, bool), form: Form) -> (PathBuf, String) {
    let bundle = laboratory.bundle(form, precision);
    let matrix = "model.layers.2.mlp.down_proj.weight";
    let plant = Plant::Matrix(matrix.to_owned(), Damage::Scale);
    let found = find(&bundle, form, &plant);
    check(&format!("{} {form:?}", precision.0), &plant, found.as_ref());
    let out = laboratory.laboratory.folder.path().join(format!("{} {form:?} reproducer", precision.0));
    reproducer::write(&Rebuilt::new(&bundle).unwrap(), &found.unwrap(), &out, false).unwrap();
    (out, matrix.to_owned())
}

#[test]
fn a_reproducer_has_one_layer_and_its_integers() {
    let laboratory = QuantizedLaboratory::new();
    for precision in PRECISIONS {
        let (out, matrix) = reproduced(&laboratory, precision, FORMS[0]);
        let json = std::fs::read(out.join("reproducer.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["culprit"]["matrix"], matrix.as_str(), "{json}");
        let weights: Vec<&str> =
            json["culprit"]["weights"].as_array().unwrap().iter().filter_map(|w| w.as_str()).collect();
        assert!(!weights.is_empty() && weights.iter().all(|name| name.starts_with(&matrix)), "{weights:?}");
        assert!(out.join("model.onnx").is_file() && out.join("inputs.npz").is_file());
    }
}

#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_onnxruntime_shows_the_difference() {
    let laboratory = QuantizedLaboratory::new();
    for precision in PRECISIONS {
        for form in [FORMS[0], FORMS[2]] {
            let (out, _) = reproduced(&laboratory, precision, form);
            let (code, text) = super::run_stock(&out);
            assert_eq!(code, Some(1), "{} {form:?}: {text}", precision.0);
            assert!(text.contains("DIFFERENT"), "{text}");
        }
    }
}
