//! Planted faults are found: the right tap of the right layer, and the module that the fault sits in.

#![allow(clippy::unwrap_used, clippy::panic)]

mod compressors;
mod faults;
mod quantized;
mod quantized_compressors;
#[path = "../architectures/synthetic.rs"]
mod synthetic;

use accordion::bisect::case::Visit;
use accordion::bisect::culprit::{Found, Origin};
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::search::first_wrong;
use accordion::bisect::terms::Terms;
use accordion::bisect::{BisectError, cumulative, homer, plain, reproducer};
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::precision::Recipe;
use accordion::reference::llama::Llama as Reference;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::Detail;
use accordion::verify::homer::HomerInput;
use accordion::verify::verdict::Verdict;
use accordion_graphs::architecture::Llama;
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use faults::{Fault, FaultyRuntime, Frequencies};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use synthetic::{Storage, small_llama, write_checkpoint};
use tempfile::TempDir;

const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 20, max_initial_chunk_len: None, target_len: 16, layers_warmup: 2 };

fn architecture() -> Llama {
    small_llama(8)
}

/// What runs a graph, and of which method.
#[derive(Debug, Clone, Copy)]
struct Form {
    homer: bool,
    target: Target,
    fused: bool,
}

const FORMS: [Form; 6] = {
    const fn form(homer: bool, target: Target, fused: bool) -> Form {
        Form { homer, target, fused }
    }
    [
        form(false, Target::Portable, false),
        form(true, Target::Portable, false),
        form(false, Target::OrtCpu, true),
        form(true, Target::OrtCpu, true),
        form(false, Target::OrtCpu, false),
        form(true, Target::OrtCpu, false),
    ]
};

/// A sound checkpoint, and the reference of it.
struct Laboratory {
    folder: TempDir,
    good: Checkpoint,
    reference: Reference,
}

impl Laboratory {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        write_checkpoint(&dir, &architecture(), &Storage { dtype: DType::F32, shards: 1 }, 11);
        let good = Checkpoint::open(&dir).unwrap();
        let reference = Reference::load(&architecture(), |tensor| good.tensor(tensor)).unwrap();
        Self { folder, good, reference }
    }

    /// A bundle with the fault, if that is one of bundles.
    fn bundle(&self, fault: &Fault, form: Form, name: &str) -> Bundle {
        let dir = self.folder.path().join(format!("{name} checkpoint"));
        fault.write_checkpoint(&self.good, &architecture(), &dir);
        let method = if form.homer {
            MethodSettings::Homer { settings: SETTINGS, tree_heights: vec![2], significance: None }
        } else {
            MethodSettings::Plain
        };
        let out = self.folder.path().join(name);
        let options = ExportOptions {
            method,
            target: form.target,
            weights: WeightStorage::Link,
            recipe: Recipe::fp32(),
            force: false,
        };
        export(&Checkpoint::open(dir).unwrap(), &out, &options).unwrap();
        Bundle::open(out).unwrap()
    }

    /// Looks for what is wrong with `bundle` where the runtime has the fault, if that is one of runtimes.
    fn bisect(&self, bundle: &Bundle, rebuilt: &Rebuilt<'_>, fault: &Fault, form: Form) -> Option<Found> {
        let loader = self.loader(bundle, fault, form);
        first_wrong(&loader, &mut |_| {}, |visit| self.cases(rebuilt, form, visit)).unwrap()
    }

    fn loader(&self, bundle: &Bundle, fault: &Fault, form: Form) -> FaultyRuntime {
        let rope = &self.reference.architecture().rope;
        faulty_runtime(bundle, fault, form.fused, Frequencies::new(rope.theta, architecture().head_dim))
    }

    fn cases(&self, rebuilt: &Rebuilt<'_>, form: Form, visit: &mut Visit<'_>) -> Result<ControlFlow<()>, BisectError> {
        cases(rebuilt, &self.reference, form.homer, visit)
    }
}

/// The significance bias of every layer.
fn bias(plan: &HomerPlan) -> Vec<Vec<f32>> {
    let row: Vec<f32> = (0..=plan.max_distance()).map(|d| 0.3 / (1.0 + d as f32)).collect();
    vec![row; architecture().num_layers]
}

/// A tree of height 2.
const LENGTHS: PromptLengths = PromptLengths { prefix: 3, context: 50, suffix: 4 };

fn token_ids() -> Vec<u32> {
    (0..66).map(|i| i * 31 % 97).collect()
}

fn cases(
    rebuilt: &Rebuilt<'_>,
    reference: &Reference,
    homer: bool,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let ids = token_ids();
    if !homer {
        return plain::cases(rebuilt, reference, &ids[..33], visit);
    }
    let plan = HomerPlan::new(architecture().num_layers, LENGTHS, SETTINGS).unwrap();
    assert_eq!(plan.tree_height, 2);
    let bias = bias(&plan);
    let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
    let (prefix, context, suffix, teacher) = (&ids[..3], &ids[3..53], &ids[53..57], &ids[57..]);
    let input = HomerInput { plan: &plan, prefix, context, suffix, teacher, bias: &bias, width: 1 };
    homer::cases(rebuilt, reference, &input, visit)
}

fn faulty_runtime(bundle: &Bundle, fault: &Fault, fused_operators: bool, rotary: Frequencies) -> FaultyRuntime {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let sound = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators }).unwrap();
    FaultyRuntime { sound, fault: fault.clone(), rotary }
}

/// Whether `found` is `fault`: the tap, the layer with it, the module, and few others beside.
fn check(what: &str, fault: &Fault, found: Option<&Found>) {
    let Some(found) = found else { panic!("{what}: nothing found") };
    let culprit = &found.culprit;
    let (mut tap, module) = (fault.tap(), fault.module());
    // A leaf's embeddings are what enters it.
    if tap == "embed" && culprit.graph.starts_with("leaf") {
        "in_hidden".clone_into(&mut tap);
    }
    let summary = reproducer::summary(culprit);
    assert_eq!(culprit.tap, tap, "{what}:\n{summary}");
    assert!(culprit.modules.contains(&module), "{what}: {module} is not named:\n{summary}");
    assert_eq!(culprit.origin, Origin::Nodes, "{what}:\n{summary}");
    // Between two taps of a gated MLP lie a norm, three projections, and what joins them.
    assert!(culprit.modules.len() <= 8, "{what}:\n{summary}");
    // Halving, what the nodes read, and a few points beside them.
    let digits = (usize::BITS - culprit.points.leading_zeros()) as usize;
    let most = digits + culprit.reads.len() + 8;
    assert!(culprit.runs <= most, "{what}: {} runs for {} points", culprit.runs, culprit.points);
}

#[test]
fn fifty_planted_faults_are_found_by_name() {
    let laboratory = Laboratory::new();
    let mut random = ChaCha8Rng::seed_from_u64(50);
    let mut faults: Vec<Fault> = ["model.embed_tokens", "model.norm", "lm_head"]
        .into_iter()
        .map(|module| Fault::Weight(format!("{module}.weight")))
        .chain([Fault::EveryEpsilon, Fault::Theta])
        .collect();
    faults.extend((0..45).map(|i| Fault::random(i, architecture().num_layers, &mut random)));
    for (i, fault) in faults.iter().enumerate() {
        let form = FORMS[random.next_u32() as usize % FORMS.len()];
        let bundle = laboratory.bundle(fault, form, &format!("bundle {i}"));
        let rebuilt = Rebuilt::new(&bundle).unwrap();
        let found = laboratory.bisect(&bundle, &rebuilt, fault, form);
        check(&format!("{i}: {fault:?} in {form:?}"), fault, found.as_ref());
    }
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let laboratory = Laboratory::new();
    for (i, form) in FORMS.into_iter().enumerate() {
        // An epsilon of a layer there is none of.
        let fault = Fault::Epsilon("model.layers.99.input_layernorm".to_owned());
        let bundle = laboratory.bundle(&fault, form, &format!("bundle {i}"));
        let found = laboratory.bisect(&bundle, &Rebuilt::new(&bundle).unwrap(), &fault, form);
        assert!(found.is_none(), "{form:?}:\n{}", reproducer::summary(&found.unwrap().culprit));
    }
}

/// Every layer makes the stream a little longer, within its bounds.
#[test]
fn what_many_layers_made_together_is_blamed_on_none() {
    let laboratory = Laboratory::new();
    let bundle = laboratory.bundle(&Fault::Drift, FORMS[0], "bundle");
    let rebuilt = Rebuilt::new(&bundle).unwrap();
    let found = laboratory.bisect(&bundle, &rebuilt, &Fault::Drift, FORMS[0]).unwrap();
    let summary = reproducer::summary(&found.culprit);
    assert_eq!(found.culprit.origin, Origin::Accumulated, "{summary}");
    assert!(!found.culprit.tap.starts_with("layers.0."), "{summary}");
    // Only the whole way shows it.
    let reads: Vec<&str> = found.part.reads.iter().map(|read| read.name.as_str()).collect();
    assert!(reads.contains(&"input_ids"), "{reads:?}");
    assert!(found.inputs.iter().map(|(name, _)| name.as_str()).eq(reads), "{summary}");
}

#[test]
fn another_versions_graph_is_refused() {
    let laboratory = Laboratory::new();
    let fault = scale(0);
    let bundle = laboratory.bundle(&fault, FORMS[0], "bundle");
    // A graph of the same name and another content, which the manifest knows.
    let path = bundle.dir().join("decoder.onnx");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(accordion_graphs::onnx::tap_outputs(&["rows.rotary.Cos"]));
    std::fs::write(&path, &bytes).unwrap();
    let manifest = bundle.dir().join("bundle.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    json["graphs"]["decoder"]["sha256"] = sha256(&bytes).into();
    std::fs::write(&manifest, json.to_string()).unwrap();
    let changed = Bundle::open(bundle.dir()).unwrap();
    let rebuilt = Rebuilt::new(&changed).unwrap();
    let error = rebuilt.graph("decoder").map(drop).unwrap_err();
    assert!(matches!(error, BisectError::OtherVersion { .. }), "{error}");
}

fn scale(layer: usize) -> Fault {
    Fault::Scale(format!("model.layers.{layer}.self_attn"))
}

/// One bad layer is wrong by itself; what follows from it is not.
#[test]
fn part_by_part_only_what_is_wrong_by_itself_fails() {
    let laboratory = Laboratory::new();
    for (i, form) in FORMS.into_iter().enumerate() {
        let fault = scale(2);
        let bundle = laboratory.bundle(&fault, form, &format!("bundle {i}"));
        let rebuilt = Rebuilt::new(&bundle).unwrap();
        let loader = laboratory.loader(&bundle, &fault, form);
        let mut cases = 0;
        let all = |visit: &mut Visit<'_>| laboratory.cases(&rebuilt, form, visit);
        let terms = Terms::of(&bundle);
        let found = cumulative::compare(&loader, &terms, Detail::All, &mut |done| cases = done, all).unwrap();
        let wrong: Vec<&str> =
            found.taps.iter().filter(|t| t.verdict == Verdict::Fail).map(|t| t.name.as_str()).collect();
        assert!(wrong.iter().all(|name| name.ends_with("layers.2.attn.out")), "{form:?}: {wrong:?}");
        // Of a tree of height 2 four leaves run layer 2, and the decoder does.
        assert_eq!((wrong.len(), cases), if form.homer { (5, 9) } else { (1, 1) }, "{form:?}: {wrong:?}");
        assert!(found.taps.len() > 8 * 7, "{form:?}: {}", found.taps.len());
    }
}

/// The decoder of a tree is looked at behind the compressed context.
#[test]
fn a_decoder_that_forgets_where_its_context_ends_is_found() {
    let laboratory = Laboratory::new();
    for form in [FORMS[1], FORMS[3]] {
        // The last layer's queries of one node are pruned by; of the decoder, all are asked.
        let fault = Fault::Position("model.layers.7.self_attn".to_owned(), 'q');
        let bundle = laboratory.bundle(&fault, form, &format!("bundle {form:?}"));
        let rebuilt = Rebuilt::new(&bundle).unwrap();
        let sound = laboratory.loader(&bundle, &Fault::EveryEpsilon, form);
        let faulty = laboratory.loader(&bundle, &fault, form);
        let mut seen = Vec::new();
        let _all = laboratory
            .cases(&rebuilt, form, &mut |case| {
                let loader = if case.graph.name == "decoder" { &faulty } else { &sound };
                let found = first_wrong(loader, &mut |_| {}, |visit| visit(case))?;
                seen.push((case.graph.name.clone(), found.map(|found| found.culprit.tap)));
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
        let (decoder, tree) = seen.split_last().unwrap();
        assert!(tree.iter().all(|(_, found)| found.is_none()), "{seen:?}");
        assert_eq!(decoder, &("decoder".to_owned(), Some("layers.7.attn.q".to_owned())));
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    format!("{:x}", Sha256::digest(bytes))
}

fn verify(bundle: &Bundle, arguments: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.arg("verify").arg(bundle.dir()).args(["--bisect", "--json"]).args(arguments);
    let output = command.output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), json, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_command_says_what_it_found_and_how_it_ended() {
    let laboratory = Laboratory::new();
    for (name, form) in [("plain", FORMS[0]), ("homer", FORMS[3])] {
        let fault = Fault::NotANumber("model.layers.2.self_attn.o_proj.weight".to_owned());
        let bundle = laboratory.bundle(&fault, form, name);
        let folder = laboratory.folder.path().join(format!("{name} reproducer"));
        let (code, json, errors) = verify(&bundle, &["--context", "40", "--reproducer", folder.to_str().unwrap()]);
        assert_eq!(code, Some(1), "{errors}");
        assert_eq!(json["culprit"]["tap"], "layers.2.attn_residual", "{json}");
        assert!(folder.join("model.onnx").is_file());

        let sound = laboratory.bundle(&scale(0), form, &format!("sound {name}"));
        let (code, json, errors) = verify(&sound, &["--context", "40"]);
        assert_eq!((code, &json["culprit"]), (Some(0), &serde_json::Value::Null), "{errors}");
    }
}

/// A reproducer of a weight fault, beside the laboratory's other files.
fn reproduced(laboratory: &Laboratory, fault: &Fault, form: Form, name: &str) -> PathBuf {
    let bundle = laboratory.bundle(fault, form, name);
    let rebuilt = Rebuilt::new(&bundle).unwrap();
    let found = laboratory.bisect(&bundle, &rebuilt, fault, form).unwrap();
    let out = laboratory.folder.path().join(format!("{name} reproducer"));
    reproducer::write(&rebuilt, &found, &out, false).unwrap();
    // What is there stays.
    assert!(reproducer::write(&rebuilt, &found, &out, false).is_err());
    reproducer::write(&rebuilt, &found, &out, true).unwrap();
    out
}

#[test]
fn a_reproducer_is_small_and_stands_by_itself() {
    let laboratory = Laboratory::new();
    let fault = Fault::Weight("model.layers.5.self_attn.o_proj.weight".to_owned());
    let out = reproduced(&laboratory, &fault, FORMS[0], "small");
    let mut files: Vec<String> =
        std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    files.sort_unstable();
    let expected = [
        "README.md",
        "expected.npz",
        "inputs.npz",
        "model.onnx",
        "reproduce.py",
        "reproducer.json",
        "weights.safetensors",
    ];
    assert_eq!(files, expected);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("reproducer.json")).unwrap()).unwrap();
    assert_eq!(json["culprit"]["weights"], serde_json::json!(["model.layers.5.self_attn.o_proj.weight"]));
    let taps: Vec<&str> =
        json["culprit"]["reads"].as_array().unwrap().iter().filter_map(|r| r["tap"].as_str()).collect();
    assert_eq!(taps, ["layers.4.out", "layers.5.attn.out"]);
    // One projection of 64 by 64 and its header.
    let size = std::fs::metadata(out.join("weights.safetensors")).unwrap().len();
    assert!((64 * 64 * 4..64 * 64 * 4 + 512).contains(&size), "{size}");
    let readme = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(readme.contains("python reproduce.py") && readme.contains("polygraphy run model.onnx"), "{readme}");
}

fn run_stock(folder: &Path) -> (Option<i32>, String) {
    let python = std::env::var_os("ACCORDION_STOCK_PYTHON").unwrap();
    let output = Command::new(python).arg(folder.join("reproduce.py")).output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.code(), text)
}

#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_onnxruntime_shows_the_difference() {
    let laboratory = Laboratory::new();
    for (i, form) in FORMS.into_iter().enumerate() {
        for tensor in ["layers.5.self_attn.k_proj", "layers.7.mlp.gate_proj", "layers.0.input_layernorm"] {
            let fault = Fault::Weight(format!("model.{tensor}.weight"));
            let out = reproduced(&laboratory, &fault, form, &format!("{tensor} {i}"));
            let (code, text) = run_stock(&out);
            assert_eq!(code, Some(1), "{tensor} in {form:?}: {text}");
            assert!(text.contains("DIFFERENT"), "{text}");
        }
        // A fault of the runtime is not one of stock onnxruntime.
        let out = reproduced(&laboratory, &scale(3), form, &format!("runtime {i}"));
        let (code, text) = run_stock(&out);
        assert_eq!(code, Some(0), "{form:?}: {text}");
        assert!(text.contains("within the bounds"), "{text}");
    }
}
