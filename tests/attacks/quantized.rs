//! Quantized bundles whose record, parts or scales cannot be what an export wrote.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::sparse;
use accordion::bundle::{Bundle, ExportOptions, MANIFEST_FILE, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::precision::Recipe;
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::Precision;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use tempfile::TempDir;

const MATRIX: &str = "model.layers.2.mlp.up_proj.weight";
const WEIGHTS: &str = "weights.safetensors";

/// Name, type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A quantized bundle of the tiny model.
struct Scene {
    root: TempDir,
}

impl Scene {
    fn new(precision: Precision) -> Self {
        let scene = Self { root: tempfile::tempdir().unwrap() };
        let checkpoint = scene.root.path().join("checkpoint");
        fs::create_dir(&checkpoint).unwrap();
        sparse::write(&checkpoint, &sparse::tiny_model(), "F32", 1);
        let options = ExportOptions {
            method: MethodSettings::Plain,
            target: Target::Portable,
            weights: WeightStorage::Link,
            recipe: Recipe::of(precision),
            force: false,
        };
        export(&Checkpoint::open(&checkpoint).unwrap(), &scene.out(), &options).unwrap();
        Bundle::open(scene.out()).unwrap();
        scene
    }

    fn out(&self) -> PathBuf {
        self.root.path().join("bundle")
    }

    fn edit_manifest(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.out().join(MANIFEST_FILE);
        let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        fs::write(path, manifest.to_string()).unwrap();
    }

    /// Puts the form in the place of the matrix's.
    fn set_form(&self, form: Value) {
        self.edit_manifest(|manifest| manifest["quantization"]["matrices"][MATRIX] = form);
    }

    /// Writes other tensors, and has the manifest vouch for them.
    fn edit_tensors(&self, edit: impl FnOnce(&mut Tensors)) {
        let path = self.out().join(WEIGHTS);
        let bytes = fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let owned = |(name, view): (String, TensorView<'_>)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let mut tensors: Tensors = tensors.tensors().into_iter().map(owned).collect();
        edit(&mut tensors);
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        self.vouch();
    }

    /// Has the manifest describe the file of the tensors as it is.
    fn vouch(&self) {
        let path = self.out().join(WEIGHTS);
        let bytes = fs::read(&path).unwrap();
        let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let hash = |bytes: &[u8]| format!("{:x}", Sha256::digest(bytes));
        let modified = File::open(&path).unwrap().metadata().unwrap().modified().unwrap();
        let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        self.edit_manifest(|manifest| {
            let weights = &mut manifest["weights"][0];
            weights["size"] = json!(bytes.len());
            weights["header_sha256"] = json!(hash(&bytes[8..8 + header]));
            weights["sha256"] = json!(hash(&bytes));
            weights["modified_ns"] = json!(u64::try_from(modified).unwrap());
        });
    }

    /// The one line with which the command refuses the bundle.
    fn refusal(&self) -> String {
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_accordion")).arg("inspect").arg(self.out()).output();
        let output = output.unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(output.stdout.is_empty());
        message
    }
}

#[track_caller]
fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn forms_that_do_not_fit_the_model_are_refused() {
    for (form, words) in [
        (json!({"form": "block", "bits": 5, "block": 16}), &["5 bits"][..]),
        (json!({"form": "block", "bits": 8, "block": 0}), &["blocks of 0", "power of two"]),
        (json!({"form": "block", "bits": 8, "block": 24}), &["blocks of 24", "power of two"]),
        (json!({"form": "block", "bits": 4, "block": 1024}), &["blocks of 1024", "divides its rows"]),
        (json!({"form": "block", "bits": 4, "block": 1_u64 << 60}), &["power of two from 16 to 1024"]),
    ] {
        let scene = Scene::new(Precision::WeightInt8);
        scene.set_form(form);
        assert_names(&scene.refusal(), &[&[MATRIX], words].concat());
    }
    for name in ["model.layers.99.mlp.up_proj.weight", "model.norm.weight", ""] {
        let scene = Scene::new(Precision::WeightInt8);
        scene.edit_manifest(|m| m["quantization"]["matrices"][name] = json!({"form": "fp8"}));
        assert_names(&scene.refusal(), &[&format!("matrix '{name}'"), "is no matrix of the model"]);
    }
    for form in [json!("int8"), json!({"form": "int3"}), json!({"form": "block", "bits": 8, "block": -8}), json!(null)]
    {
        let scene = Scene::new(Precision::WeightInt8);
        scene.set_form(form);
        assert_names(&scene.refusal(), &[MANIFEST_FILE]);
    }
}

#[test]
fn a_form_whose_parts_are_other_ones_is_refused() {
    let scene = Scene::new(Precision::Int8PerToken);
    scene.set_form(json!({"form": "int8", "smoothed": false}));
    assert_names(&scene.refusal(), &[&format!("{MATRIX}.input_scale")]);
    let scene = Scene::new(Precision::Int8PerToken);
    scene.set_form(json!({"form": "int8-per-token", "smoothed": true}));
    assert_names(&scene.refusal(), &[&format!("{MATRIX}.smoothing")]);
    // As many scales as rows are not as many as blocks.
    let scene = Scene::new(Precision::Int8PerToken);
    scene.set_form(json!({"form": "block", "bits": 8, "block": 16}));
    assert_names(&scene.refusal(), &[&format!("{MATRIX}.scale"), "shape"]);
    let scene = Scene::new(Precision::WeightInt8);
    scene.edit_manifest(|m| drop(m.as_object_mut().unwrap().remove("quantization")));
    assert_names(&scene.refusal(), &["model.embed_tokens.weight"]);
}

#[test]
fn missing_and_misshapen_parts_are_named() {
    for part in ["scale", "int8"] {
        let name = format!("{MATRIX}.{part}");
        let scene = Scene::new(Precision::WeightInt8);
        scene.edit_tensors(|tensors| drop(tensors.remove(&name)));
        assert_names(&scene.refusal(), &[&name]);
    }
    let (scale, entries) = (format!("{MATRIX}.scale"), format!("{MATRIX}.int8"));
    let scene = Scene::new(Precision::WeightInt8);
    scene.edit_tensors(|tensors| tensors.get_mut(&scale).unwrap().1.reverse());
    assert_names(&scene.refusal(), &[&scale, "shape"]);
    let scene = Scene::new(Precision::WeightInt8);
    scene.edit_tensors(|tensors| tensors.get_mut(&entries).unwrap().0 = Dtype::U8);
    assert_names(&scene.refusal(), &[&entries, "uint8", "int8"]);
    let scene = Scene::new(Precision::WeightInt8);
    scene.edit_tensors(|tensors| tensors.get_mut(&scale).unwrap().0 = Dtype::I32);
    assert_names(&scene.refusal(), &[&scale, "int32", "fp32"]);
}

#[test]
fn a_file_that_breaks_off_is_refused_whoever_vouches_for_it() {
    for vouched in [false, true] {
        let scene = Scene::new(Precision::WeightInt4);
        let path = scene.out().join(WEIGHTS);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 8]).unwrap();
        if vouched {
            scene.vouch();
        }
        assert_names(&scene.refusal(), &[WEIGHTS]);
    }
}

#[test]
fn scales_that_nothing_can_be_counted_in_are_named() {
    let wrong = [f32::NAN, 0.0, -0.0, -0.5, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 2.0];
    for number in wrong {
        for part in ["scale", "input_scale", "smoothing"] {
            let scene = Scene::new(Precision::Int8PerToken);
            scene.edit_tensors(|tensors| {
                let inner = tensors[&format!("{MATRIX}.int8")].1[1];
                let parts = [("input_scale", vec![]), ("smoothing", vec![inner])];
                for (part, shape) in parts {
                    let numbers = vec![0.5; shape.iter().product()];
                    tensors.insert(format!("{MATRIX}.{part}"), (Dtype::F32, shape, floats(&numbers)));
                }
            });
            scene.set_form(json!({"form": "int8", "smoothed": true}));
            Bundle::open(scene.out()).unwrap();

            let name = format!("{MATRIX}.{part}");
            let mut place = 0;
            scene.edit_tensors(|tensors| {
                let bytes = &mut tensors.get_mut(&name).unwrap().2;
                place = bytes.len() / 4 - 1;
                bytes[place * 4..].copy_from_slice(&number.to_le_bytes());
            });
            let found = format!("has {number} at place {place}, expected a positive number");
            assert_names(&scene.refusal(), &[&name, &found]);
        }
    }
}
