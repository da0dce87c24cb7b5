//! Bundles and exports that lie, break off or would destroy something.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::sparse;
use accordion::bundle::{
    Bundle, BundleError, ExportOptions, Exported, MANIFEST_FILE, MethodSettings, WeightStorage, export, tree_heights,
};
use accordion::checkpoint::{Checkpoint, model_identity};
use accordion::precision::Recipe;
use accordion_calibration::significance::{ModelIdentity, Provenance, SignificanceEstimator, Smoothing};
use accordion_graphs::architecture::RopeScaling;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::HomerSettings;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 32, max_initial_chunk_len: None, target_len: 32, layers_warmup: 2 };
const WEIGHTS: &str = "model.safetensors";

/// A folder with a tiny checkpoint, and a place beside it for bundles.
struct Scene {
    root: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir(scene.checkpoint_dir()).unwrap();
        sparse::write(&scene.checkpoint_dir(), &sparse::tiny_model(), "F32", 1);
        scene
    }

    fn checkpoint_dir(&self) -> PathBuf {
        self.root.path().join("checkpoint")
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(self.checkpoint_dir()).unwrap()
    }

    fn out(&self) -> PathBuf {
        self.root.path().join("bundle")
    }

    fn export(&self, options: &ExportOptions) -> Result<Exported, BundleError> {
        export(&self.checkpoint(), &self.out(), options)
    }

    /// With a bundle that is in order.
    fn exported(weights: WeightStorage) -> Self {
        let scene = Self::new();
        scene.export(&ExportOptions { weights, ..homer(None) }).unwrap();
        Bundle::open(scene.out()).unwrap();
        scene
    }

    /// Why the bundle cannot be opened.
    fn refusal(&self) -> String {
        Bundle::open(self.out()).map(|_| "it opened").unwrap_err().to_string()
    }

    fn edit_manifest(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.out().join(MANIFEST_FILE);
        let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut manifest);
        fs::write(path, manifest.to_string()).unwrap();
    }

    /// Everything in the root, and the bytes of the files one folder below.
    fn content(&self) -> Vec<(PathBuf, Vec<u8>)> {
        content(self.root.path())
    }
}

fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(content(&path));
            found.push((path, Vec::new()));
        } else {
            found.push((path.clone(), fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

fn homer(significance: Option<PathBuf>) -> ExportOptions {
    let tree_heights = tree_heights(6, SETTINGS, 100).unwrap();
    let method = MethodSettings::Homer { settings: SETTINGS, tree_heights, significance };
    ExportOptions { method, target: Target::OrtCpu, weights: WeightStorage::Link, recipe: Recipe::fp32(), force: false }
}

fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

#[test]
fn changed_weights_are_named() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 3] = [
        ("size in bytes", |path| {
            let file = File::options().append(true).open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.set_len(file.metadata().unwrap().len() + 4).unwrap();
            file.set_modified(modified).unwrap();
        }),
        ("header hash", |path| {
            let modified = path.metadata().unwrap().modified().unwrap();
            let mut bytes = fs::read(path).unwrap();
            // Two tensors of one shape change places.
            let place = |name: &[u8]| bytes.windows(name.len()).position(|window| window == name).unwrap();
            let [k, v] = [place(b"k_proj"), place(b"v_proj")];
            bytes.swap(k, v);
            fs::write(path, bytes).unwrap();
            File::options().append(true).open(path).unwrap().set_modified(modified).unwrap();
        }),
        ("time of the last change", |path| {
            // One nanosecond: a file that was written again in the same second is another file.
            let file = File::options().append(true).open(path).unwrap();
            file.set_modified(file.metadata().unwrap().modified().unwrap() + Duration::from_nanos(1)).unwrap();
        }),
    ];
    for (what, change) in changes {
        let scene = Scene::exported(WeightStorage::Link);
        // Through the checkpoint's own name for the file.
        change(&scene.checkpoint_dir().join(WEIGHTS));
        assert_names(&scene.refusal(), &[WEIGHTS, "changed since the export", what, "export the bundle again"]);
    }
}

#[test]
fn a_bundle_of_copies_may_be_moved_but_not_changed() {
    let scene = Scene::exported(WeightStorage::Copy);
    let weights = scene.out().join(WEIGHTS);
    let file = File::options().append(true).open(&weights).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    Bundle::open(scene.out()).unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_names(&scene.refusal(), &[WEIGHTS, "SHA-256"]);
}

#[test]
fn lost_weights_are_named() {
    let scene = Scene::exported(WeightStorage::Link);
    fs::remove_file(scene.out().join(WEIGHTS)).unwrap();
    assert_names(&scene.refusal(), &[WEIGHTS]);
}

#[test]
fn a_damaged_manifest_is_refused() {
    let scene = Scene::exported(WeightStorage::Link);
    let path = scene.out().join(MANIFEST_FILE);
    let whole = fs::read(&path).unwrap();
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert_names(&scene.refusal(), &[MANIFEST_FILE, "not valid JSON"]);
    }
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_names(&scene.refusal(), &[MANIFEST_FILE, "not valid JSON"]);
    fs::remove_file(&path).unwrap();
    assert_names(&scene.refusal(), &[MANIFEST_FILE, "not a bundle"]);
    fs::create_dir(&path).unwrap();
    assert_names(&scene.refusal(), &[MANIFEST_FILE, "not a regular file"]);
}

#[test]
fn a_manifest_that_lies_is_refused() {
    type Edit = fn(&mut Value);
    let lies: [(&[&str], Edit); 15] = [
        (&["schema is 'accordion.bundle/2'", "accordion.bundle/1"], |m| m["schema"] = json!("accordion.bundle/2")),
        (&["schema is 'missing'"], |m| drop(m.as_object_mut().unwrap().remove("schema"))),
        (&["fingerprint"], |m| drop(m.as_object_mut().unwrap().remove("fingerprint"))),
        (&["'../weights' must not leave"], |m| m["weights"][0]["file"] = json!("../weights")),
        (&["'/etc/passwd' must not leave"], |m| m["weights"][0]["file"] = json!("/etc/passwd")),
        (&["'..' must not leave"], |m| m["graphs"]["decoder"]["file"] = json!("..")),
        (&["'a/b.onnx' must not leave"], |m| m["graphs"]["decoder"]["file"] = json!("a/b.onnx")),
        (&["'' must not leave"], |m| m["graphs"]["decoder"]["file"] = json!("")),
        (&["'../t' must not leave"], |m| m["significance"] = json!({"file": "../t", "sha256": ""})),
        (&["num_hidden_layers"], |m| m["architecture"]["num_layers"] = json!(1_u64 << 60)),
        // Heads times width wraps around to the true number of rows.
        (&["num_attention_heads"], |m| m["architecture"]["num_heads"] = json!((1_u64 << 62) + 4)),
        (&["model.layers.6"], |m| m["architecture"]["num_layers"] = json!(7)),
        (&["rope_scaling.factor"], |m| m["architecture"]["rope"]["scaling"] = json!({"type": "linear", "factor": 0.0})),
        (&["model.embed_tokens.weight"], |m| m["weights"] = json!([])),
        (&["kv_cache is int8", "no graph decoder_kv_int8"], |m| m["kv_cache"] = json!("int8")),
    ];
    for (words, lie) in lies {
        let scene = Scene::exported(WeightStorage::Link);
        scene.edit_manifest(lie);
        let message = scene.refusal();
        assert_names(&message, words);
        assert!(message.contains(&scene.out().display().to_string()), "no file is named: {message}");
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_no_manifest() {
    use std::os::unix::ffi::OsStrExt;
    let scene = Scene::exported(WeightStorage::Link);
    let path = scene.out().join(MANIFEST_FILE);
    fs::remove_file(&path).unwrap();
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the name is a C string that lives across the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    // Reading it would wait for a writer that never comes.
    assert_names(&scene.refusal(), &[MANIFEST_FILE, "not a regular file"]);
}

#[test]
fn changed_and_missing_graphs_are_named() {
    let scene = Scene::exported(WeightStorage::Link);
    let graph = scene.out().join("decoder.onnx");
    let mut bytes = fs::read(&graph).unwrap();
    bytes[100] ^= 1;
    fs::write(&graph, bytes).unwrap();
    let bundle = Bundle::open(scene.out()).unwrap();
    assert_names(&bundle.graph("decoder").unwrap_err().to_string(), &["decoder.onnx", "SHA-256"]);
    fs::remove_file(&graph).unwrap();
    assert_names(&bundle.graph("decoder").unwrap_err().to_string(), &["decoder.onnx"]);
    assert_names(&bundle.graph("merge.9-9").unwrap_err().to_string(), &["no graph 'merge.9-9'"]);
}

#[test]
fn nothing_is_replaced_unasked_and_only_bundles_are_replaced() {
    let scene = Scene::exported(WeightStorage::Link);
    let before = scene.content();
    let message = scene.export(&homer(None)).unwrap_err().to_string();
    assert_names(&message, &["bundle", "exists already", "--force"]);
    assert_eq!(scene.content(), before);

    let forced = ExportOptions { method: MethodSettings::Plain, force: true, ..homer(None) };
    scene.export(&forced).unwrap();
    let bundle = Bundle::open(scene.out()).unwrap();
    assert_eq!(bundle.manifest().method.name(), "plain");
    assert!(!scene.out().join("head.onnx").exists(), "the old bundle is still there");
    assert_eq!(fs::read_dir(scene.root.path()).unwrap().count(), 2, "something was left beside the bundle");

    for make in [|path: &Path| fs::write(path, "a diary").unwrap(), |path: &Path| fs::create_dir(path).unwrap()] {
        let scene = Scene::new();
        make(&scene.out());
        let before = scene.content();
        let message = scene.export(&forced).unwrap_err().to_string();
        assert_names(&message, &["not a bundle", "--force replaces only bundles"]);
        assert_eq!(scene.content(), before);
    }
}

#[test]
fn a_weight_file_with_a_name_of_the_bundle_destroys_nothing() {
    for name in ["decoder.onnx", "config.json", MANIFEST_FILE, "significance.safetensors"] {
        let scene = Scene::new();
        let dir = scene.checkpoint_dir();
        // A folder of its own, because config.json must be there for the checkpoint to open.
        let elsewhere = scene.root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        sparse::write(&elsewhere, &sparse::tiny_model(), "F32", 1);
        let shard = if name == "config.json" { "tokenizer.json" } else { name };
        fs::rename(elsewhere.join(WEIGHTS), dir.join(shard)).unwrap();
        fs::remove_dir_all(&elsewhere).unwrap();
        fs::remove_file(dir.join(WEIGHTS)).unwrap();
        let model = sparse::tiny_model();
        let names = accordion::checkpoint::required_tensors(&model).map(|(name, _)| (name, json!(shard)));
        let index = json!({"weight_map": names.collect::<serde_json::Map<_, _>>()});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();

        let table = scene.root.path().join("table");
        save_table(&table, model_identity(&scene.checkpoint()), 31);
        let before = scene.content();
        for weights in [WeightStorage::Link, WeightStorage::Copy] {
            let options = ExportOptions { weights, ..homer(Some(table.clone())) };
            assert_names(&scene.export(&options).unwrap_err().to_string(), &["two files", shard]);
            assert_eq!(scene.content(), before, "{weights:?}");
        }
    }
}

fn save_table(path: &Path, model: ModelIdentity, max_distance: usize) {
    let mut estimator = SignificanceEstimator::new(6, max_distance).unwrap();
    estimator.add_window(&[0.5; 6 * 8]).unwrap();
    let provenance = Provenance {
        model,
        text_sha256: "ab".repeat(32),
        window_tokens: 8,
        seed: 1,
        smoothing: Smoothing::default(),
        tool: "test".into(),
    };
    estimator.finish(provenance).unwrap().save(path).unwrap();
}

#[test]
fn a_significance_table_goes_along_if_it_is_the_models() {
    let scene = Scene::new();
    let checkpoint = scene.checkpoint();
    let table = scene.root.path().join("table.safetensors");
    save_table(&table, model_identity(&checkpoint), 31);
    scene.export(&homer(Some(table.clone()))).unwrap();
    let bundle = Bundle::open(scene.out()).unwrap();
    assert_eq!(bundle.significance().unwrap().unwrap().num_distances(), 32);

    let copy = scene.out().join("significance.safetensors");
    let mut bytes = fs::read(&copy).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&copy, bytes).unwrap();
    assert_names(&bundle.significance().unwrap_err().to_string(), &["significance.safetensors", "SHA-256"]);
    // A table that is whole, but another model's: the hash is put right, as someone would who swaps tables.
    save_table(&copy, ModelIdentity { fingerprint: "other".into(), ..model_identity(&checkpoint) }, 31);
    let hash = format!("{:x}", <sha2::Sha256 as sha2::Digest>::digest(fs::read(&copy).unwrap()));
    scene.edit_manifest(|manifest| manifest["significance"]["sha256"] = json!(hash));
    let message = Bundle::open(scene.out()).unwrap().significance().unwrap_err().to_string();
    assert_names(&message, &["significance.safetensors", "the model other"]);
}

#[test]
fn a_significance_table_that_does_not_fit_is_refused() {
    let scene = Scene::new();
    let model = model_identity(&scene.checkpoint());
    let scaled = scene.checkpoint().with_rope_scaling(RopeScaling::Linear { factor: 2.0 });
    let cases = [
        ("other", ModelIdentity { fingerprint: "other".into(), ..model.clone() }, 31, "the model other"),
        ("rope", model_identity(&scaled), 31, "linear factor 2"),
        ("short", model, 30, "31 distances, 32 are needed"),
    ];
    for (name, model, max_distance, word) in cases {
        let table = scene.root.path().join(name);
        save_table(&table, model, max_distance);
        assert_names(&scene.export(&homer(Some(table.clone()))).unwrap_err().to_string(), &[name, word]);
        fs::remove_file(table).unwrap();
        assert_eq!(fs::read_dir(scene.root.path()).unwrap().count(), 1, "something was left behind");
    }
    let no_table = scene.checkpoint_dir().join("config.json");
    assert_names(&scene.export(&homer(Some(no_table))).unwrap_err().to_string(), &["config.json", "not a valid table"]);
    let nothing = scene.root.path().join("nothing");
    assert_names(&scene.export(&homer(Some(nothing))).unwrap_err().to_string(), &["nothing"]);
    assert_eq!(fs::read_dir(scene.root.path()).unwrap().count(), 1, "something was left behind");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let scene = Scene::new();
    let before = scene.content();
    // Folders that even root cannot write into.
    let mut places = vec![scene.checkpoint_dir().join("config.json/bundle"), scene.root.path().join("no/bundle")];
    if cfg!(target_os = "linux") {
        places.push(PathBuf::from("/proc/bundle"));
    }
    for out in places {
        let message = export(&scene.checkpoint(), &out, &homer(None)).unwrap_err().to_string();
        assert_names(&message, &[&out.parent().unwrap().display().to_string()]);
        assert_eq!(scene.content(), before);
    }
}

/// The command in a child process whose files cannot grow beyond `bytes`: writing on is an error, as on a full disk, or,
/// with `kill`, its end.
#[cfg(unix)]
fn export_with_limit(scene: &Scene, bytes: u64, kill: bool) -> std::process::Output {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.args(["export", "homer"]).args([scene.checkpoint_dir(), scene.out()]);
    // The same export as that of `homer`, so that the limits fit.
    command.args(["--context", "100", "--max-chunk-len", "32", "--layers-warmup", "2"]);
    // SAFETY: between fork and exec only async-signal-safe functions are called.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            let action = if kill { libc::SIG_DFL } else { libc::SIG_IGN };
            if libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) != 0
                || libc::signal(libc::SIGXFSZ, action) == libc::SIG_ERR
            {
                return Err(std::io::Error::last_os_error());
            }
            // A killed child leaves no core file.
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            Ok(())
        });
    }
    command.output().unwrap()
}

/// Sizes at which writing breaks off in every file that an export of the tiny checkpoint writes.
#[cfg(unix)]
fn limits() -> Vec<u64> {
    let scene = Scene::exported(WeightStorage::Link);
    let mut sizes: Vec<u64> = Vec::new();
    for entry in fs::read_dir(scene.out()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name != WEIGHTS && name != "config.json" {
            sizes.push(entry.metadata().unwrap().len() - 1);
        }
    }
    sizes.push(0);
    sizes
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    for limit in limits() {
        let scene = Scene::new();
        let before = scene.content();
        let output = export_with_limit(&scene, limit, false);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{limit}: {message}");
        assert_names(&message, &[&scene.out().display().to_string(), "File too large"]);
        assert_eq!(message.lines().count(), 1, "{message}");
        assert_eq!(scene.content(), before, "{limit}");
    }
}

#[cfg(unix)]
#[test]
fn what_a_killed_export_leaves_is_no_bundle() {
    let mut leftovers = 0;
    for limit in limits() {
        let scene = Scene::new();
        let output = export_with_limit(&scene, limit, true);
        assert_eq!(output.status.code(), None, "{limit}: it was not killed");
        assert!(!scene.out().exists(), "{limit}: half a bundle");
        for (path, _) in scene.content().iter().filter(|(path, _)| path.is_dir() && *path != scene.checkpoint_dir()) {
            assert!(Bundle::open(path).is_err(), "{limit}: {} was accepted", path.display());
            leftovers += 1;
        }
        // The next export is not disturbed by them.
        scene.export(&homer(None)).unwrap();
        Bundle::open(scene.out()).unwrap();
    }
    assert!(leftovers > 0, "nothing was left, so nothing was tested");
}
