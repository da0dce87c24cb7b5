//! `accordion verify`: agreement passes, and every planted fault is found where it was planted.

use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::{Checkpoint, config_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::verify::golden::{rcc, sharedllm};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use onnx_protobuf::{ModelProto, NodeProto};
use protobuf::Message;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Tokens of the context that the bundles are made for: a tree of height 2.
const CONTEXT: usize = 60;

fn golden(name: &str) -> PathBuf {
    goldens().join(format!("homer/homer_{name}.json"))
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn verify(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_accordion")).arg("verify").args(arguments).output().unwrap()
}

/// The model of golden case G as a checkpoint.
fn checkpoint(folder: &Path) -> PathBuf {
    let case = HomerCase::open(&golden("G")).unwrap();
    let dir = folder.join("checkpoint");
    fs::create_dir(&dir).unwrap();
    fs::copy(case.weights_path(), dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("config.json"), config_json(&case.architecture).to_string()).unwrap();
    dir
}

fn bundle(folder: &Path, checkpoint: &Path, method: MethodSettings) -> PathBuf {
    let out = folder.join("bundle");
    let options = ExportOptions {
        method,
        target: Target::OrtCpu,
        weights: WeightStorage::Copy,
        recipe: Recipe::fp32(),
        force: false,
    };
    export(&Checkpoint::open(checkpoint).unwrap(), &out, &options).unwrap();
    out
}

fn homer() -> MethodSettings {
    let case = HomerCase::open(&golden("G")).unwrap();
    let tree_heights = tree_heights(case.architecture.num_layers, case.settings, CONTEXT).unwrap();
    MethodSettings::Homer { settings: case.settings, tree_heights, significance: None }
}

fn homer_bundle(folder: &Path) -> PathBuf {
    bundle(folder, &checkpoint(folder), homer())
}

/// Changes `bundle.json`.
fn edit_manifest(bundle: &Path, edit: impl FnOnce(&mut Value)) {
    let path = bundle.join("bundle.json");
    let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(&path, manifest.to_string()).unwrap();
}

/// Changes the graphs whose names begin with `kind`, and says in the manifest that they were exported like that.
fn edit_graphs(bundle: &Path, kind: &str, edit: impl Fn(&mut ModelProto)) {
    edit_manifest(bundle, |manifest| {
        for (_, graph) in
            manifest["graphs"].as_object_mut().unwrap().iter_mut().filter(|(name, _)| name.starts_with(kind))
        {
            let path = bundle.join(graph["file"].as_str().unwrap());
            let mut model = ModelProto::parse_from_bytes(&fs::read(&path).unwrap()).unwrap();
            edit(&mut model);
            let bytes = model.write_to_bytes().unwrap();
            graph["sha256"] = format!("{:x}", Sha256::digest(&bytes)).into();
            fs::write(path, bytes).unwrap();
        }
    });
}

/// Sets a float attribute of a node.
fn set(node: &mut NodeProto, attribute: &str, value: f32) {
    node.attribute.iter_mut().find(|a| a.name == attribute).unwrap().f = value;
}

fn run(bundle: &Path, more: &[&str]) -> (Option<i32>, Value) {
    let mut arguments = vec![bundle.to_str().unwrap(), "--json"];
    arguments.extend(more);
    let output = verify(&arguments);
    let report = serde_json::from_slice(&output.stdout);
    (output.status.code(), report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr))))
}

/// The result of the tap `name`.
fn tap<'r>(report: &'r Value, name: &str) -> &'r Value {
    let mut taps = report["scopes"].as_array().unwrap().iter().flat_map(|scope| scope["taps"].as_array().unwrap());
    taps.find(|tap| tap["name"] == name).unwrap()
}

fn count(report: &Value) -> [u64; 4] {
    let counts = &report["counts"];
    [&counts["pass"], &counts["ambiguous"], &counts["fail"], &report["not_comparable"]].map(|n| n.as_u64().unwrap())
}

#[test]
fn a_faithful_bundle_passes_at_every_width_and_detail() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    let file = folder.path().join("report.json");
    let (code, report) = run(&bundle, &["--out", file.to_str().unwrap()]);
    assert_eq!((code, &report["schema"]), (Some(0), &"accordion.verify/1".into()), "{report:#}");
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap(), report);
    let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
    let scopes: Vec<&str> = report["scopes"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    let nodes = ["h0.i0", "h0.i1", "h1.i0", "h0.i2", "h0.i3", "h1.i1", "h2.i0"].map(|n| format!("node.{n}"));
    let nodes = nodes.iter().map(String::as_str);
    let expected: Vec<&str> = std::iter::once("weights").chain(nodes).chain(["prefix", "cache", "teacher"]).collect();
    assert_eq!(scopes, expected);
    assert_eq!((&report["samples"], &report["one_sided"]), (&1.into(), &0.into()), "{report:#}");
    for seconds in ["actual_seconds", "expected_seconds", "compare_seconds", "total_over_expected"] {
        assert!(report["cost"][seconds].as_f64().is_some_and(|seconds| seconds > 0.0), "{seconds}: {report:#}");
    }
    let logits = tap(&report, "teacher.logits");
    let ranks = &logits["difference"]["choices"]["ranks"];
    assert!(ranks["mean_overlap"].as_f64().unwrap() > 0.999 && ranks["max_divergence"].as_f64().unwrap() < 1e-6);

    let (code, wide) = run(&bundle, &["--width", "max", "--operators", "portable"]);
    assert_eq!((code, count(&wide)), (Some(0), [all, 0, 0, 0]));
    let less = ["nodes", "result"].map(|taps| count(&run(&bundle, &["--taps", taps]).1));
    assert!(all > less[0][0] && less[0][0] > less[1][0] && less[1][0] > 20, "{all} {less:?}");

    let output = verify(&[bundle.to_str().unwrap(), "--seed", "3"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("PASS: bundle (homer), ort-cpu fp32"), "{text}");
}

#[test]
fn a_wrong_constant_is_found_at_the_first_tap_it_touches() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    edit_manifest(&bundle, |manifest| {
        let base = &mut manifest["architecture"]["rope"]["theta"];
        *base = (base.as_f64().unwrap() * 1.5).into();
    });
    let (code, report) = run(&bundle, &[]);
    assert_eq!((code, &report["verdict"]), (Some(1), &"FAIL".into()), "{report:#}");
    assert_eq!(report["first_failure"], "node.h0.i0.layers.0.attn.q");

    let output = verify(&[bundle.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().last().unwrap().ends_with("the first to fail is node.h0.i0.layers.0.attn.q"), "{text}");
    assert!(text.lines().count() < 60, "{text}");
}

#[test]
fn a_fault_in_one_layer_of_one_graph_is_found_there() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    edit_graphs(&bundle, "merge", |model| {
        let graph = model.graph.as_mut().unwrap();
        let last = graph.node.iter().rposition(|n| n.name.contains("post_attention_layernorm")).unwrap();
        set(&mut graph.node[last], "epsilon", 1.0);
    });
    let (code, report) = run(&bundle, &[]);
    assert_eq!(code, Some(1));
    assert_eq!(report["first_failure"], "node.h1.i0.layers.4.mlp.out");
}

#[test]
fn another_selection_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    // The graphs get another table than the reference: the scores differ, and with them what is kept.
    edit_graphs(&bundle, "leaf", |model| {
        let call = model.graph.as_mut().unwrap().node.iter_mut().find(|n| n.op_type == "TopKPrune").unwrap();
        set(call, "scale", -1.0);
    });
    let (code, report) = run(&bundle, &[]);
    assert_eq!((code, &report["first_failure"]), (Some(1), &"node.h0.i0.prune.metric_last".into()), "{report:#}");
    let [_, _, failed, not_comparable] = count(&report);
    // Four leaves fail in metric, scores and selection; their own results and all above them are left out.
    assert_eq!(failed, 12, "{report:#}");
    assert!(not_comparable > 50, "{not_comparable}");
}

#[test]
fn numbers_that_are_none_are_found_in_the_weights_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = checkpoint(folder.path());
    let name = "model.layers.1.mlp.up_proj.weight";
    let weight = Checkpoint::open(&dir).unwrap().weights().get(name).unwrap().clone();
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let width = weight.shape[1];
    let at = weight.offset as usize + 4 * (2 * width + 3);
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let bundle = bundle(folder.path(), &dir, MethodSettings::Plain);
    let output = verify(&[bundle.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("1 NaN and 1 infinite numbers in tensor {name}, first at [2, 3]")), "{text}");
}

#[test]
fn the_plain_decoder_is_compared_row_by_row() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle(folder.path(), &checkpoint(folder.path()), MethodSettings::Plain);
    let (code, short) = run(&bundle, &["--context", "40"]);
    assert_eq!(code, Some(0), "{short:#}");
    let (code, long) = run(&bundle, &["--context", "600", "--taps", "result"]);
    assert_eq!(code, Some(0), "{long:#}");
    let names = |report: &Value| -> Vec<String> {
        let scopes = report["scopes"].as_array().unwrap();
        scopes.iter().flat_map(|s| s["taps"].as_array().unwrap()).map(|t| t["name"].as_str().unwrap().into()).collect()
    };
    for name in ["layers.1.attn.v", "logits", "cache.k.0"] {
        assert!(names(&short).iter().any(|n| n == name), "{name}");
    }
    assert!(names(&long).starts_with(&["weights", "rows.0.logits", "rows.512.logits"].map(String::from)));

    edit_graphs(&bundle, "decoder", |model| {
        let graph = model.graph.as_mut().unwrap();
        let norm = graph.node.iter_mut().find(|n| n.name.contains("model.norm")).unwrap();
        set(norm, "epsilon", 1.0);
    });
    let (code, report) = run(&bundle, &["--context", "40"]);
    assert_eq!((code, &report["first_failure"]), (Some(1), &"logits".into()));
    // Of the context, and of the teacher's tokens.
    assert_eq!(count(&report)[2], 2);
}

#[test]
fn a_golden_case_is_held_against_reference_and_graphs() {
    let output = verify(&["--golden", golden("C").to_str().unwrap(), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let scopes: Vec<&str> = report["scopes"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(scopes, ["reference", "portable", "ort-cpu"]);
    let [passed, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
    assert!(passed > 300, "{passed}");

    let folder = tempfile::tempdir().unwrap();
    for part in [".json", "_weights.safetensors", "_main.safetensors", "_trace.safetensors"] {
        fs::copy(golden("D").with_file_name(format!("homer_D{part}")), folder.path().join(format!("homer_D{part}")))
            .unwrap();
    }
    let trace = folder.path().join("homer_D_trace.safetensors");
    let mut bytes = fs::read(&trace).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let at = data + header["node.h0.i0.out_hidden"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&99.0_f32.to_le_bytes());
    fs::write(&trace, bytes).unwrap();
    let output = verify(&["--golden", folder.path().join("homer_D.json").to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the first to fail is reference.node.h0.i0.out_hidden"), "{text}");
}

/// Makes the graphs whose names begin with `kind` read the weight `to` where they read `from`.
fn rewire(bundle: &Path, kind: &str, from: &str, to: &str) {
    edit_graphs(bundle, kind, |model| {
        let inputs = model.graph.as_mut().unwrap().node.iter_mut().flat_map(|node| &mut node.input);
        let read: Vec<&mut String> = inputs.filter(|input| input.ends_with(from)).collect();
        assert!(!read.is_empty(), "nothing reads {from}");
        for input in read {
            *input = input.replace(from, to);
        }
    });
}

fn scopes(report: &Value) -> Vec<&str> {
    report["scopes"].as_array().unwrap().iter().map(|scope| scope["name"].as_str().unwrap()).collect()
}

#[test]
fn an_rcc_bundle_is_compared_segment_by_segment() {
    let case = RccCase::open(&goldens().join("rcc/qwen2_r8.config.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = rcc::bundle(&case, Target::OrtCpu, &Recipe::fp32(), folder.path()).unwrap().dir().to_owned();
    let (code, report) = run(&bundle, &[]);
    assert_eq!(code, Some(0), "{report:#}");
    let expected = ["weights", "segments.0", "segments.1", "segments.2", "prompt", "teacher", "cache"];
    assert_eq!(scopes(&report), expected);
    let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
    let less = ["nodes", "result"].map(|taps| count(&run(&bundle, &["--taps", taps, "--context", "40"]).1));
    assert!(all > less[0][0] && less[0][0] > less[1][0] && less[1][0] > 8, "{all} {less:?}");
    assert!(less.iter().all(|[_, other @ ..]| *other == [0; 3]), "{less:?}");

    rewire(&bundle, "encoder", "A_matrix.1.weight", "A_matrix.0.weight");
    let (code, report) = run(&bundle, &[]);
    assert_eq!((code, &report["first_failure"]), (Some(1), &"segments.0.maps.2".into()));
}

#[test]
fn a_sharedllm_bundle_is_compared_from_the_tree_to_the_last_token() {
    for (quirks, depth) in [(Quirks::Faithful, 3), (Quirks::Fixed, 2), (Quirks::Faithful, 1)] {
        let mut case = SharedLlmCase::open(&goldens().join("sharedllm/case_q4.json")).unwrap();
        case.tree_depth = depth;
        let folder = tempfile::tempdir().unwrap();
        let bundle =
            sharedllm::bundle(&case, case.weights_path(), quirks, Target::OrtCpu, &Recipe::fp32(), folder.path())
                .unwrap();
        let (code, report) = run(bundle.dir(), &["--steps", "3"]);
        assert_eq!(code, Some(0), "{quirks:?}, {depth}: {report:#}");
        let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
        for part in ["tree.0", "kv.0", "running", "teacher", "steps.0", "steps.2", "cache"] {
            assert!(scopes(&report).contains(&part), "{part}: {report:#}");
        }
        let arguments = ["--steps", "3", "--taps", "result", "--width", "2", "--operators", "portable"];
        let (code, less) = run(bundle.dir(), &arguments);
        assert_eq!(code, Some(0), "{quirks:?}, {depth}: {less:#}");
        assert!(count(&less)[0] < all && count(&less)[0] > 10);

        let [own, other] = [0, 1].map(|layer| format!("layers.{layer}.cross_attn.o_proj.weight"));
        rewire(bundle.dir(), "decoder", &own, &other);
        let (code, report) = run(bundle.dir(), &["--steps", "1"]);
        assert_eq!((code, &report["first_failure"]), (Some(1), &"running.layers.0.cross_residual".into()));
    }
}

#[test]
fn golden_cases_of_every_method_are_found_by_their_files() {
    for (path, method, parts) in [
        ("rcc/mamba_pairs.config.json", "rcc", &["reference", "portable", "ort-cpu"][..]),
        ("rcc/neox_r32.cases.safetensors", "rcc", &["reference", "portable", "ort-cpu"]),
        (
            "sharedllm/case_lm3.json",
            "sharedllm",
            &["reference", "portable", "ort-cpu", "reference fixed", "portable fixed", "ort-cpu fixed"],
        ),
    ] {
        let output = verify(&["--golden", goldens().join(path).to_str().unwrap(), "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{path}: {report:#}");
        assert_eq!((&report["subject"]["method"], scopes(&report)), (&method.into(), parts.to_vec()));
        assert_eq!(count(&report)[1..], [0; 3]);
    }
    let output = verify(&["--golden", "/nowhere/tokenizer.json"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && error.contains("not a golden case; expected homer_<case>.json"),
        "{error}"
    );
}

/// The plain bundle of `checkpoint` for `target`, called `name`.
fn plain(folder: &Path, checkpoint: &Path, target: Target, name: &str) -> PathBuf {
    let out = folder.join(name);
    let options = ExportOptions {
        method: MethodSettings::Plain,
        target,
        weights: WeightStorage::Copy,
        recipe: Recipe::fp32(),
        force: false,
    };
    export(&Checkpoint::open(checkpoint).unwrap(), &out, &options).unwrap();
    out
}

#[test]
fn two_bundles_of_one_model_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(folder.path());
    let [portable, other] = [(Target::Portable, "portable"), (Target::OrtCpu, "other")]
        .map(|(target, name)| plain(folder.path(), &checkpoint, target, name));
    let against =
        |more: &[&str]| run(&portable, &[&["--against", other.to_str().unwrap(), "--context", "40"], more].concat());
    let (code, report) = against(&["--samples", "3"]);
    assert_eq!((code, &report["samples"]), (Some(0), &3.into()), "{report:#}");
    assert_eq!(report["subject"]["expected"], "other ort-cpu fp32 (ort-cpu graphs)");
    let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
    assert!(all > 20, "{all}");

    edit_graphs(&other, "decoder", |model| {
        let graph = model.graph.as_mut().unwrap();
        let norm = graph.node.iter_mut().find(|n| n.name.contains("layers.1.post_attention_layernorm")).unwrap();
        set(norm, "epsilon", 1.0);
    });
    let (code, report) = against(&[]);
    assert_eq!((code, &report["first_failure"]), (Some(1), &"layers.1.mlp.out".into()), "{report:#}");
    // With other bounds the same difference is none.
    assert_eq!(against(&["--bounds", "bf16", "--taps", "result"]).1["schema"], "accordion.verify/1");

    let homer = bundle(folder.path(), &checkpoint, homer());
    let output = verify(&[portable.to_str().unwrap(), "--against", homer.to_str().unwrap()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && error.contains("its method is"), "{error}");
}

#[test]
fn what_was_recorded_is_compared_later() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, side) in [("reference.npz", "reference"), ("bundle.safetensors", "bundle")] {
        let arguments = [bundle.to_str().unwrap(), "--record", &path(name), "--side", side, "--seed", "5"];
        let output = verify(&arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        // What was asked stands in the file.
        let (code, report) = run(&bundle, &["--against", &path(name)]);
        assert_eq!(code, Some(0), "{report:#}");
        let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
        assert!(all > 100, "{all}");
        assert_eq!(count(&run(&bundle, &["--seed", "5"]).1), [all, 0, 0, 0], "{name}");
    }
    let arguments = [&path("bundle.safetensors"), "--against", &path("reference.npz"), "--json"];
    let output = verify(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));

    // One number is another.
    let mut bytes = fs::read(path("bundle.safetensors")).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let at = data + header["node.h1.i1.layers.4.mlp.out"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&99.0_f32.to_le_bytes());
    fs::write(path("wrong.safetensors"), bytes).unwrap();
    for arguments in [
        [bundle.to_str().unwrap(), "--against", &path("wrong.safetensors"), "--json"],
        [&path("wrong.safetensors"), "--against", &path("reference.npz"), "--json"],
    ] {
        let output = verify(&arguments);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{report:#}");
        assert_eq!((count(&report)[2], &report["first_failure"]), (1, &"node.h1.i1.layers.4.mlp.out".into()));
    }

    // Nothing is left of a recording that failed.
    let output = verify(&[bundle.to_str().unwrap(), "--record", &path("none.npz"), "--context", "200"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!Path::new(&path("none.npz")).exists());
}

#[test]
fn samples_are_recorded_and_compared_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = plain(folder.path(), &checkpoint(folder.path()), Target::OrtCpu, "bundle");
    let file = folder.path().join("two.npz").to_str().unwrap().to_owned();
    let output = verify(&[bundle.to_str().unwrap(), "--record", &file, "--context", "20", "--samples", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let (code, report) = run(&bundle, &["--against", &file]);
    assert_eq!((code, &report["samples"]), (Some(0), &2.into()), "{report:#}");
    assert_eq!(report["subject"]["environment"][0][1], "0 + 20 + 0, then 8");
}

/// A file that another program wrote: a few outputs, with the batch axis, under the names of the graph.
#[test]
fn outputs_that_another_program_recorded_are_found_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = plain(folder.path(), &checkpoint(folder.path()), Target::OrtCpu, "bundle");
    let ours = folder.path().join("ours.safetensors");
    let arguments = ["--record", ours.to_str().unwrap(), "--context", "20", "--steps", "0"];
    let output = verify(&[&[bundle.to_str().unwrap()], &arguments[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(&ours).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let foreign = |changed: f32, extra: Option<&str>| {
        let theirs = folder.path().join("theirs.safetensors");
        let views =
            [("logits", "logits"), ("cache.k.1", "present.1.key")].into_iter().chain(extra.map(|e| ("logits", e)));
        let views: Vec<(&str, Vec<usize>, Vec<u8>)> = views
            .map(|(tap, output)| {
                let view = tensors.tensor(tap).unwrap();
                let mut data = view.data().to_vec();
                let first = f32::from_le_bytes(data[..4].try_into().unwrap()) + changed;
                data[..4].copy_from_slice(&first.to_le_bytes());
                (output, [&[1], view.shape()].concat(), data)
            })
            .collect();
        let views =
            views.iter().map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &theirs).unwrap();
        run(&bundle, &["--against", theirs.to_str().unwrap(), "--context", "20", "--steps", "0"])
    };
    let (code, report) = foreign(0.0, None);
    // And the weights.
    assert_eq!((code, count(&report)[0]), (Some(0), 3), "{report:#}");
    assert!(report["one_sided"].as_u64().unwrap() > 10);
    let (code, report) = foreign(1.0, None);
    assert_eq!((code, count(&report)[2]), (Some(1), 2), "{report:#}");
    let (code, report) = foreign(0.0, Some("hidden_states"));
    assert_eq!((code, &report["first_failure"]), (Some(1), &"hidden_states".into()), "{report:#}");
}

#[test]
fn every_part_is_right_on_the_values_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    let (code, report) = run(&bundle, &["--cumulative"]);
    assert_eq!(code, Some(0), "{report:#}");
    let [all, 0, 0, 0] = count(&report) else { panic!("{report:#}") };
    assert!(all > 100 && report["subject"]["expected"].as_str().unwrap().starts_with("reference, which"), "{all}");
}

#[test]
fn bisection_knows_every_method() {
    let folder = tempfile::tempdir().unwrap();
    let rcc_case = RccCase::open(&goldens().join("rcc/mamba_pairs.config.json")).unwrap();
    let shared_case = SharedLlmCase::open(&goldens().join("sharedllm/case_q4.json")).unwrap();
    let [one, two] = ["rcc", "sharedllm"].map(|name| folder.path().join(name));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    let weights = shared_case.weights_path();
    for bundle in [
        rcc::bundle(&rcc_case, Target::OrtCpu, &Recipe::fp32(), &one).unwrap(),
        sharedllm::bundle(&shared_case, weights, Quirks::Fixed, Target::Portable, &Recipe::fp32(), &two).unwrap(),
    ] {
        let output = verify(&[bundle.dir().to_str().unwrap(), "--bisect"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("every output of every graph is within its bounds"), "{text}");
    }
}

#[test]
fn what_cannot_be_compared_is_said_with_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = homer_bundle(folder.path());
    let bundle = bundle.to_str().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, [0xFF, 0xFE]).unwrap();
    for (arguments, message) in [
        (&["--context", "0"][..], "--context is 0"),
        (&["--context", "200"], "has no graph"),
        (&["--prefix", "9999"], "max_chunk_len"),
        (&["--text", text.to_str().unwrap()], "is not UTF-8 text"),
        (&["--out", "/nowhere/report.json"], "/nowhere/report.json"),
        (&["--golden", "homer_X.json"], "cannot be used with"),
        (&["--against", "/nowhere"], "expected reference, a bundle, or a recording"),
        (&["--record", "taps.bin"], "a recording is called .safetensors or .npz"),
        (&["--record", "taps.npz", "--bisect"], "cannot be used with"),
        (&["--side", "reference"], "--record"),
        (&["--text", "/nowhere", "--samples", "0"], "0 is not in 1..=1024"),
    ] {
        let output = verify(&[&[bundle], arguments].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(message), "{arguments:?}: {error}");
    }
}

/// Sets every number of the tensor `name` of a checkpoint.
fn fill(checkpoint: &Path, name: &str, value: f32) {
    let opened = Checkpoint::open(checkpoint).unwrap();
    let weight = opened.weights().get(name).unwrap().clone();
    drop(opened);
    let file = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let number = match weight.dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        other => panic!("{name} is {other}"),
    };
    let start = weight.offset as usize;
    for place in bytes[start..start + weight.len as usize].chunks_exact_mut(number.len()) {
        place.copy_from_slice(&number);
    }
    fs::remove_file(&file).unwrap();
    fs::write(file, bytes).unwrap();
}

#[test]
fn where_half_precision_runs_out_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(folder.path());
    // The weights are numbers of half precision, what they make of the rows is not.
    fill(&checkpoint, "model.layers.1.mlp.up_proj.weight", 3_000.0);
    fill(&checkpoint, "model.layers.1.mlp.down_proj.weight", 30_000.0);
    let bundle = |precision, name: &str| {
        let out = folder.path().join(name);
        let options = ExportOptions {
            method: MethodSettings::Plain,
            target: Target::Portable,
            weights: WeightStorage::Copy,
            recipe: Recipe::of(precision),
            force: false,
        };
        export(&Checkpoint::open(&checkpoint).unwrap(), &out, &options).unwrap();
        out
    };
    let (_, report) = run(&bundle(Precision::Fp32, "fp32"), &[]);
    assert_eq!(report["first_non_finite"], Value::Null, "{report:#}");
    let half = bundle(Precision::Fp16, "fp16");
    let (code, report) = run(&half, &[]);
    assert_eq!((code, &report["first_non_finite"]), (Some(1), &"layers.1.mlp.out".into()), "{report:#}");
    let text = String::from_utf8(verify(&[half.to_str().unwrap()]).stdout).unwrap();
    assert!(text.contains("the first with a NaN or an infinity is layers.1.mlp.out"), "{text}");
}
