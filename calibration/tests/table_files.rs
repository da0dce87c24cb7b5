//! Table files: what is written is read again, and nothing else is accepted.
#![allow(clippy::unwrap_used, clippy::panic)]

use accordion_calibration::significance::{
    FORMAT, METADATA_KEY, MismatchError, ModelIdentity, Provenance, SignificanceEstimator, SignificanceTable,
    Smoothing, TableProblem,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::Path;

fn model() -> ModelIdentity {
    ModelIdentity { fingerprint: "0123abcd".into(), rope: r#"{"theta":10000.0,"scaling":{"type":"none"}}"#.into() }
}

fn table() -> SignificanceTable {
    let mut estimator = SignificanceEstimator::new(2, 9).unwrap();
    estimator.add_window(&[0.5, -1.0, 2.0, 3.5, 0.1, -0.2, 0.3, -0.4]).unwrap();
    estimator.add_window(&[0.25, 7.0]).unwrap();
    let provenance = Provenance {
        model: model(),
        text_sha256: "ab".repeat(32),
        window_tokens: 4,
        seed: u64::MAX,
        smoothing: Smoothing::default(),
        tool: "accordion 0.0.0".into(),
    };
    estimator.finish(provenance).unwrap()
}

fn problem(path: &Path) -> TableProblem {
    let error = SignificanceTable::load(path).unwrap_err();
    assert!(error.to_string().contains(&path.display().to_string()), "{error} does not name the file");
    error.problem
}

/// A table file that differs from a good one as `edit` says.
struct Parts {
    metadata: Option<HashMap<String, String>>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }
    fn entry(&mut self) -> &mut String {
        self.metadata.as_mut().unwrap().get_mut(METADATA_KEY).unwrap()
    }
    fn put(&mut self, name: &str, index: usize, bytes: &[u8]) {
        let start = index * bytes.len();
        self.tensor(name).3[start..start + bytes.len()].copy_from_slice(bytes);
    }
}

fn problem_of_edited(edit: impl FnOnce(&mut Parts)) -> TableProblem {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edited.safetensors");
    table().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let tensors = tensors.into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    let mut parts = Parts { metadata: metadata.metadata().clone(), tensors };
    edit(&mut parts);
    let views = parts.tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(&path, safetensors::serialize(views, parts.metadata).unwrap()).unwrap();
    problem(&path)
}

#[test]
fn round_trip_is_exact_and_deterministic() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| folder.path().join(name));
    table().save(&first).unwrap();
    let read = SignificanceTable::load(&first).unwrap();
    read.save(&second).unwrap();
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());

    let made = table();
    assert_eq!((read.num_layers(), read.num_distances(), read.windows(), read.measured_distance()), (2, 10, 2, 3));
    assert_eq!(read.provenance(), made.provenance());
    assert_eq!(read.counts(), made.counts());
    for layer in 0..2 {
        assert_eq!(read.bias(layer), made.bias(layer));
        assert_eq!(read.deviation(layer).to_bits(), made.deviation(layer).to_bits());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left behind");
}

#[test]
fn saving_replaces_and_failing_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    std::fs::write(&path, "old").unwrap();
    table().save(&path).unwrap();
    SignificanceTable::load(&path).unwrap();

    let occupied = folder.path().join("folder");
    std::fs::create_dir_all(occupied.join("inside")).unwrap();
    assert!(matches!(table().save(&occupied).unwrap_err().problem, TableProblem::Io(_)));
    assert!(table().save(&folder.path().join("missing/table")).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "only the table and the folder");
}

#[cfg(unix)]
#[test]
fn a_saved_table_has_the_permissions_of_an_ordinary_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let [table_path, ordinary] = ["table", "ordinary"].map(|name| folder.path().join(name));
    table().save(&table_path).unwrap();
    std::fs::write(&ordinary, "").unwrap();
    let [a, b] = [table_path, ordinary].map(|path| std::fs::metadata(path).unwrap().permissions().mode());
    assert_eq!(a, b);
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut");
    table().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for length in (0..bytes.len()).rev() {
        file.set_len(length as u64).unwrap();
        assert!(matches!(problem(&path), TableProblem::Safetensors(_)), "{length} of {} bytes", bytes.len());
    }
    std::fs::write(&path, [bytes, vec![0]].concat()).unwrap();
    assert!(matches!(problem(&path), TableProblem::Safetensors(_)));
}

#[test]
fn lying_headers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lie");
    let file = |header: &str, length: u64| [&length.to_le_bytes(), header.as_bytes()].concat();
    for header in [
        r#"{"bias":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        r#"{"bias":{"dtype":"F32","shape":[1,4],"data_offsets":[0,16]}}"#,
        r#"{"bias":{"dtype":"F32","shape":[1,4],"data_offsets":[16,0]}}"#,
        "not json",
    ] {
        for length in [header.len() as u64, u64::MAX, 99_000_000] {
            std::fs::write(&path, file(header, length)).unwrap();
            assert!(matches!(problem(&path), TableProblem::Safetensors(_)), "{header} {length}");
        }
    }
}

#[test]
fn a_file_of_absurd_size_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(problem(&path), TableProblem::TooLarge { .. }));
}

#[test]
fn missing_files_and_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing");
    assert!(matches!(problem(&path), TableProblem::Io(_)));
    assert!(matches!(problem(folder.path()), TableProblem::Io(_)));
}

#[test]
fn metadata_is_checked() {
    assert!(matches!(problem_of_edited(|p| p.metadata = None), TableProblem::NoMetadata { .. }));
    let other = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    assert!(matches!(problem_of_edited(|p| p.metadata = Some(other)), TableProblem::NoMetadata { .. }));
    let newer = "accordion.significance/2";
    let edited = problem_of_edited(|p| *p.entry() = p.entry().replace(FORMAT, newer));
    assert!(matches!(&edited, TableProblem::Format { found, .. } if found == newer), "{edited}");
    for (field, edited) in [("fingerprint", "fingerprin"), ("seed", "sead"), ("text_sha256", "text"), ("rope", "rop")] {
        let problem =
            problem_of_edited(|p| *p.entry() = p.entry().replace(&format!("\"{field}\""), &format!("\"{edited}\"")));
        let TableProblem::Metadata { source: error, .. } = problem else { panic!("{field}: {problem}") };
        assert!(error.to_string().contains(field), "{error} does not name {field}");
    }
    assert!(matches!(problem_of_edited(|p| *p.entry() = "[".repeat(100_000)), TableProblem::Metadata { .. }));
}

#[test]
fn tensors_are_checked() {
    for name in ["bias", "count", "deviation"] {
        let problem = problem_of_edited(|p| p.tensors.retain(|t| t.0 != name));
        assert!(problem.to_string().contains(name), "{problem}");
        let problem = problem_of_edited(|p| {
            let tensor = p.tensor(name);
            tensor.1 = if tensor.1 == Dtype::F32 { Dtype::I32 } else { Dtype::U64 };
        });
        assert!(matches!(&problem, TableProblem::Type { tensor, .. } if tensor == name), "{problem}");
        let problem = problem_of_edited(|p| p.tensor(name).2.push(1));
        assert!(matches!(&problem, TableProblem::Shape { tensor, .. } if tensor == name), "{problem}");
    }
    let problem = problem_of_edited(|p| p.tensor("bias").2 = vec![4, 5]);
    assert!(matches!(&problem, TableProblem::Shape { tensor, .. } if tensor == "count"), "{problem}");
    let problem = problem_of_edited(|p| {
        let bias = p.tensor("bias");
        bias.2 = vec![1 << 40, 0];
        bias.3.clear();
    });
    assert!(matches!(&problem, TableProblem::Shape { tensor, .. } if tensor == "bias"), "{problem}");
}

#[test]
fn numbers_are_checked() {
    let cases = [
        ("bias", 13, f32::NAN.to_le_bytes().to_vec()),
        ("bias", 0, f32::NEG_INFINITY.to_le_bytes().to_vec()),
        ("deviation", 1, f32::INFINITY.to_le_bytes().to_vec()),
        ("deviation", 1, (-1.0_f32).to_le_bytes().to_vec()),
        ("count", 0, 0_i64.to_le_bytes().to_vec()),
        ("count", 9, (-1_i64).to_le_bytes().to_vec()),
        ("count", 3, 5_i64.to_le_bytes().to_vec()),
    ];
    for (name, at, bytes) in cases {
        let problem = problem_of_edited(|p| p.put(name, at, &bytes));
        assert!(
            matches!(&problem, TableProblem::Value { tensor, index, .. } if (tensor.as_str(), *index) == (name, at)),
            "{problem}"
        );
    }
}

#[test]
fn a_table_of_another_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smollm.safetensors");
    table().save(&path).unwrap();
    let table = SignificanceTable::load(&path).unwrap();
    assert_eq!(table.check_matches(&model()), Ok(()));
    let other_rope = r#"{"theta":10000.0,"scaling":{"type":"linear","factor":2.0}}"#;
    for (other, expected) in [
        (ModelIdentity { fingerprint: "ffff".into(), ..model() }, "ffff"),
        (ModelIdentity { rope: other_rope.into(), ..model() }, other_rope),
    ] {
        let error = table.check_matches(&other).unwrap_err();
        assert!(matches!(&error, MismatchError::Model(model) if model.expected == expected));
        assert!(error.to_string().contains("smollm.safetensors") && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn covers_says_what_is_missing() {
    let table = table();
    assert_eq!(table.covers(2, 9), Ok(()));
    for (layers, distance, what, found, expected) in
        [(3, 9, "layers", 2, 3), (2, 10, "distances", 10, 11), (2, usize::MAX, "distances", 10, usize::MAX)]
    {
        let error = table.covers(layers, distance).unwrap_err();
        let wanted = MismatchError::Size { table: "the significance table".into(), what, found, expected };
        assert_eq!(error, wanted);
    }
}
