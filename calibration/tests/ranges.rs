//! Range tables: what is measured is exact and does not depend on order or parts, and bad files are refused by name.
// Statistics are exact: equality is what is claimed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::float_cmp)]

use accordion_calibration::ranges::{
    BINS, Calibrator, EstimateError, FORMAT, METADATA_KEY, MergeError, MismatchError, ModelIdentity, Observation,
    RangeEstimator, RangeTable, SAMPLE_ROWS, SiteLayout, TableProblem,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn model() -> ModelIdentity {
    ModelIdentity { fingerprint: "0123abcd".into(), rope: "theta 10000 unscaled".into() }
}

fn layout() -> Vec<SiteLayout> {
    let site =
        |weights: &[&str], channels| SiteLayout { weights: weights.iter().map(|&w| w.into()).collect(), channels };
    vec![site(&["v", "q", "k"], 3), site(&["down"], 2)]
}

fn estimator(taps: &[&str]) -> RangeEstimator {
    RangeEstimator::new(layout(), taps.iter().map(|&t| t.into()).collect()).unwrap()
}

/// Numbers that differ from window to window: rows of three and rows of two.
fn numbers(window: u64, count: usize) -> Vec<f32> {
    let mut state = window.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 1e6 - 8.0
    };
    (0..count).map(|_| next() * next() * if window.is_multiple_of(3) { 1e3 } else { 1.0 }).collect()
}

fn finish(estimator: RangeEstimator) -> RangeTable {
    estimator.finish(model(), "plain".into(), 20, "accordion 0.0.0".into()).unwrap()
}

/// The table of some windows of a text, with the rows of a window in parts of `part`.
fn table(windows: &[u64], part: usize) -> RangeTable {
    let mut estimator = estimator(&["layers.0.out"]);
    for &window in windows {
        estimator.begin_window("text", window).unwrap();
        let (three, two) = (numbers(window, 60), numbers(window + 1, 40));
        for (three, two) in three.chunks(3 * part).zip(two.chunks(2 * part)) {
            let observations = [Observation::Rows(0, three), Observation::Rows(1, two), Observation::Tap(0, two)];
            estimator.observe(&observations).unwrap();
        }
    }
    finish(estimator)
}

fn saved(table: &RangeTable) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.safetensors");
    table.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn sites_say_what_was_observed() {
    let mut estimator = estimator(&["tap"]);
    for (window, rows) in [(5, [1.0, -2.0, 0.5, 3.0, 0.0, -0.0]), (9, [0.0, 6.0, 0.25, 0.0, 0.0, 0.0])] {
        estimator.begin_window("text", window).unwrap();
        let observations = [Observation::Rows(0, &rows), Observation::Rows(1, &rows[..4]), Observation::Tap(0, &rows)];
        estimator.observe(&observations).unwrap();
    }
    let table = finish(estimator);
    let site = table.site("k").unwrap();
    assert_eq!(site.weights(), ["k", "q", "v"]);
    assert_eq!((site.rows(), site.channels(), site.absmax(), site.average_absmax()), (4, 3, 6.0, 4.5));
    assert_eq!(site.channel_ranges().collect::<Vec<_>>(), [(0.0, 3.0), (-2.0, 6.0), (0.0, 0.5)]);
    assert_eq!(site.channel_absmax(), [3.0, 6.0, 0.5]);
    let mut sample: Vec<&[f32]> = site.sample().chunks(3).collect();
    sample.sort_by(|a, b| b.partial_cmp(a).unwrap());
    assert_eq!(sample, [[3.0, 0.0, 0.0], [1.0, -2.0, 0.5], [0.0, 6.0, 0.25], [0.0, 0.0, 0.0]]);
    assert_eq!(site.extremes()[..6], [0.0, 6.0, 0.25, 3.0, 0.0, 0.0]);
    assert_eq!(site.row_weights(), (1, 1));
    let [width, counts] = [site.histogram().width() as usize, site.histogram().counts()[0] as usize];
    assert_eq!((width, counts, site.histogram().counts()[1536]), (0, 6, 1));
    assert_eq!(site.threshold(Calibrator::Average), 4.5);
    assert_eq!((table.taps()["tap"].absmax, table.taps()["tap"].values), (6.0, 12));
    assert_eq!(table.windows(), 2);
    assert!(table.site("other").is_none());
}

#[test]
fn tables_do_not_depend_on_order_or_parts() {
    let whole = saved(&table(&[1, 2, 3, 4, 5], 20));
    assert_eq!(saved(&table(&[5, 3, 1, 2, 4], 7)), whole, "order of windows and calls");
    for parts in [[&[1, 2][..], &[3], &[4, 5]], [&[4], &[5, 1, 2], &[3]]] {
        let [a, b, c] = parts.map(|windows| table(windows, 20));
        assert_eq!(saved(&a.merge(&b).unwrap().merge(&c).unwrap()), whole);
        assert_eq!(saved(&c.merge(&b.merge(&a).unwrap()).unwrap()), whole);
    }
    assert_ne!(saved(&table(&[1, 2, 3, 4, 6], 20)), whole);
}

#[test]
fn a_sample_is_of_all_windows() {
    let site = &table(&[1, 2, 3, 4, 5], 20).sites()[1].clone();
    assert_eq!(site.sample().len(), 3 * SAMPLE_ROWS);
    let from =
        |window: u64| numbers(window, 60).chunks(3).filter(|row| site.sample().chunks(3).any(|s| s == *row)).count();
    let counts: Vec<usize> = (1..=5).map(from).collect();
    assert_eq!(counts.iter().sum::<usize>(), SAMPLE_ROWS);
    assert!(counts.iter().all(|&n| n > 1), "{counts:?}");
}

#[test]
fn smoothing_by_ones_changes_no_largest_magnitude_and_a_small_factor_takes_an_outlier_away() {
    let mut estimator = estimator(&[]);
    estimator.begin_window("text", 0).unwrap();
    let rows: Vec<f32> = (0..300).map(|i| if i % 3 == 1 { 100.0 } else { (i % 7) as f32 }).collect();
    estimator.observe(&[Observation::Rows(0, &rows), Observation::Rows(1, &rows)]).unwrap();
    let table = finish(estimator);
    let site = table.site("q").unwrap();
    for calibrator in [Calibrator::MinMax, Calibrator::Average, Calibrator::Percentile(100.0)] {
        assert_eq!(site.smoothed_threshold(&[1.0; 3], calibrator), site.threshold(calibrator), "{calibrator}");
        assert_eq!(site.smoothed_threshold(&[1.0, 0.01, 1.0], calibrator), 6.0, "{calibrator}");
    }
    for calibrator in [Calibrator::Mse, Calibrator::Entropy, Calibrator::Percentile(99.0)] {
        let smoothed = site.smoothed_threshold(&[1.0, 0.01, 1.0], calibrator);
        assert!((3.0..=6.0).contains(&smoothed), "{calibrator}: {smoothed}");
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let site =
        |weights: &[&str], channels| SiteLayout { weights: weights.iter().map(|&w| w.into()).collect(), channels };
    for layout in [vec![site(&[], 3)], vec![site(&["q"], 0)], vec![site(&["q"], 1), site(&["k", "q"], 1)]] {
        assert!(matches!(RangeEstimator::new(layout, vec![]), Err(EstimateError::Layout { .. })));
    }
    let observe = |rows: &[f32]| {
        let mut estimator = estimator(&[]);
        estimator.begin_window("text", 7).unwrap();
        estimator.observe(&[Observation::Rows(1, &[1.0, 2.0]), Observation::Rows(0, rows)])?;
        estimator.finish(model(), "plain".into(), 20, "test".into())
    };
    for (rows, expected) in [
        (&[1.0, 2.0][..], "the input of k has 2 numbers, expected rows of 3"),
        (
            &[1.0, f32::NAN, 2.0, 0.0, f32::INFINITY, 0.0],
            "the input of k: 2 of 6 numbers are NaN or infinite, in the window at token 7",
        ),
        (&[0.0; 3], "the input of k is always zero"),
        (&[], "no row was multiplied by k"),
    ] {
        let message = observe(rows).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let mut twice = estimator(&[]);
    twice.begin_window("text", 7).unwrap();
    twice.begin_window("other", 7).unwrap();
    assert_eq!(twice.begin_window("text", 7), Err(EstimateError::Window { sha256: "text".into(), start: 7 }));
    let nothing = estimator(&[]).finish(model(), "plain".into(), 20, "test".into());
    assert_eq!(nothing, Err(EstimateError::NoWindows));
}

#[test]
fn only_what_belongs_together_is_merged() {
    let with = |model: ModelIdentity, method: &str, window: usize, tool: &str, sites, taps: &[&str]| {
        let mut estimator = RangeEstimator::new(sites, taps.iter().map(|&t| t.into()).collect()).unwrap();
        estimator.begin_window("text", 3).unwrap();
        let rows = [1.0; 6];
        estimator.observe(&[Observation::Rows(0, &rows), Observation::Rows(1, &rows)]).unwrap();
        estimator.finish(model, method.into(), window, tool.into()).unwrap()
    };
    let first = table(&[1, 2], 20);
    let (tool, tap) = ("accordion 0.0.0", ["layers.0.out"]);
    let fine = with(model(), "plain", 20, tool, layout(), &tap);
    assert_eq!(first.merge(&fine).unwrap().windows(), 3);

    let mut joined = layout();
    joined[1].weights.push("gate".into());
    let mut wider = layout();
    wider[1].channels = 3;
    let other_model = ModelIdentity { fingerprint: "ffff".into(), ..model() };
    let other_rope = ModelIdentity { rope: "theta 1".into(), ..model() };
    for (second, expected) in [
        (with(other_model, "plain", 20, tool, layout(), &tap), "the model differs: 0123abcd and ffff"),
        (with(other_rope, "plain", 20, tool, layout(), &tap), "the rotary embedding differs"),
        (with(model(), "homer", 20, tool, layout(), &tap), "the method differs: plain and homer"),
        (with(model(), "plain", 21, tool, layout(), &tap), "the length of windows differs: 20 and 21"),
        (with(model(), "plain", 20, "accordion 9", layout(), &tap), "the program that made them differs"),
        (with(model(), "plain", 20, tool, joined, &tap), "a site differs: down with 2 channels and down, gate with 2"),
        (with(model(), "plain", 20, tool, wider, &tap), "a site differs: down with 2 channels and down with 3"),
        (with(model(), "plain", 20, tool, layout(), &[]), "a tap differs: layers.0.out and none"),
    ] {
        let message = first.merge(&second).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let twice = first.merge(&table(&[4, 2], 20)).unwrap_err();
    assert!(matches!(&twice, MergeError::Window { sha256, start: 2, .. } if sha256 == "text"), "{twice}");
}

#[test]
fn a_table_of_another_model_or_without_a_site_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("smollm.safetensors");
    table(&[1], 20).save(&path).unwrap();
    let table = RangeTable::load(&path).unwrap();
    assert_eq!(table.check_matches(&model()), Ok(()));
    let other = ModelIdentity { fingerprint: "ffff".into(), ..model() };
    let error = table.check_matches(&other).unwrap_err();
    assert!(matches!(&error, MismatchError::Model(model) if model.expected == "ffff"));
    assert!(error.to_string().contains("smollm.safetensors"), "{error}");
    assert_eq!(table.expect_site("q", 3).unwrap().rows(), 20);
    for (weight, columns, expected) in
        [("gate", 3, "no range for the input of gate"), ("q", 4, "the input of q has 3 channels, the matrix has 4")]
    {
        let message = table.expect_site(weight, columns).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("smollm.safetensors"), "{message}");
    }
}

/// A table file that differs from a good one as `edit` says.
struct Parts {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }
    fn entry(&mut self) -> &mut String {
        self.metadata.get_mut(METADATA_KEY).unwrap()
    }
    fn put(&mut self, name: &str, index: usize, bytes: &[u8]) {
        let start = index * bytes.len();
        self.tensor(name).3[start..start + bytes.len()].copy_from_slice(bytes);
    }
}

fn problem(path: &Path) -> TableProblem {
    let error = RangeTable::load(path).unwrap_err();
    assert!(error.to_string().starts_with(&format!("range table {}", path.display())), "{error}");
    error.problem
}

fn good(folder: &Path) -> PathBuf {
    let path = folder.join("edited.safetensors");
    table(&[1, 2, 3], 20).save(&path).unwrap();
    path
}

fn problem_of_edited(edit: impl FnOnce(&mut Parts)) -> TableProblem {
    let folder = tempfile::tempdir().unwrap();
    let path = good(folder.path());
    let bytes = std::fs::read(&path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let tensors = tensors.into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    let mut parts = Parts { metadata: metadata.metadata().clone().unwrap(), tensors };
    edit(&mut parts);
    let views = parts.tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(&path, safetensors::serialize(views, Some(parts.metadata)).unwrap()).unwrap();
    problem(&path)
}

#[test]
fn round_trip_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = good(folder.path());
    let read = RangeTable::load(&path).unwrap();
    let made = table(&[1, 2, 3], 20);
    assert_eq!(saved(&read), saved(&made));
    assert_eq!((read.sites(), read.taps(), read.provenance()), (made.sites(), made.taps(), made.provenance()));
}

#[test]
fn truncated_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = good(folder.path());
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(matches!(problem(&path), TableProblem::Safetensors(_)), "{length} bytes");
    }
}

#[test]
fn other_files_and_versions_are_refused() {
    assert!(matches!(problem_of_edited(|p| p.metadata.clear()), TableProblem::NoMetadata { .. }));
    let newer = "accordion.ranges/2";
    let edited = problem_of_edited(|p| *p.entry() = p.entry().replace(FORMAT, newer));
    assert!(matches!(&edited, TableProblem::Format { found, .. } if found == newer), "{edited}");
    for field in
        ["fingerprint", "rope", "method", "window_tokens", "texts", "starts", "tool", "sites", "rows", "exponent"]
    {
        let problem = problem_of_edited(|p| *p.entry() = p.entry().replace(&format!("\"{field}\""), "\"other\""));
        assert!(
            matches!(problem, TableProblem::Metadata { .. }) && problem.to_string().contains(field),
            "{field}: {problem}"
        );
    }
}

#[test]
fn missing_and_misshapen_tensors_are_refused() {
    for part in
        ["channel_min", "channel_max", "histogram", "absmax_sum", "sample", "sample_keys", "extremes", "extremes_keys"]
    {
        let name = format!("down.{part}");
        let problem = problem_of_edited(|p| p.tensors.retain(|t| t.0 != name));
        assert!(problem.to_string().contains(&name), "{problem}");
        let problem = problem_of_edited(|p| {
            let tensor = p.tensor(&name);
            tensor.1 = if tensor.1 == Dtype::F32 { Dtype::I32 } else { Dtype::I64 };
        });
        assert!(matches!(&problem, TableProblem::Type { tensor, .. } if *tensor == name), "{problem}");
        let problem = problem_of_edited(|p| p.tensor(&name).2.push(1));
        assert!(
            matches!(&problem, TableProblem::Shape { tensor, .. } if *tensor == name || part.ends_with("_keys")),
            "{problem}"
        );
    }
    for name in ["taps.layers.0.out.counts", "taps.layers.0.out.magnitudes"] {
        let problem = problem_of_edited(|p| p.tensors.retain(|t| t.0 != name));
        assert!(problem.to_string().contains(name), "{problem}");
    }
}

#[test]
fn impossible_numbers_are_refused() {
    let float = |x: f32| x.to_le_bytes().to_vec();
    let count = |n: u64| n.to_le_bytes().to_vec();
    for (name, at, bytes) in [
        ("down.channel_min", 1, float(f32::NAN)),
        ("down.channel_max", 0, float(f32::INFINITY)),
        ("down.channel_max", 0, float(-1e9)),
        ("down.sample", 3, float(f32::NAN)),
        ("down.sample", 3, float(1e9)),
        ("down.extremes", 3, float(1e9)),
    ] {
        let problem = problem_of_edited(|p| p.put(name, at, &bytes));
        assert!(
            matches!(&problem, TableProblem::Value { tensor, index, .. } if (tensor.as_str(), *index) == (name, at)),
            "{problem}"
        );
    }
    for (name, at, bytes, expected) in [
        ("down.channel_max", 0, float(1e9), "down: the histogram is not one of 120 magnitudes"),
        ("down.histogram", 0, count(0), "down: the histogram is not one of 120 magnitudes"),
        ("down.histogram", BINS - 1, count(u64::MAX), "down: the histogram is not one of 120 magnitudes"),
        ("down.absmax_sum", 1, count(u64::MAX), "down: the mean of the largest magnitudes is"),
        ("down.sample_keys", 0, count(u64::MAX), "down.sample_keys"),
        ("taps.layers.0.out.magnitudes", 0, float(f32::NAN), "tap layers.0.out: magnitudes"),
        ("taps.layers.0.out.magnitudes", 1, float(0.0), "tap layers.0.out: magnitudes"),
        ("taps.layers.0.out.counts", 1, count(u64::MAX), "tap layers.0.out: magnitudes"),
    ] {
        let problem = problem_of_edited(|p| p.put(name, at, &bytes)).to_string();
        assert!(problem.contains(expected), "{name} {at}: {problem}");
    }
    let problem = problem_of_edited(|p| {
        for name in ["down.channel_min", "down.channel_max", "down.sample", "down.extremes"] {
            p.tensor(name).3.fill(0);
        }
    });
    assert_eq!(problem.to_string(), "down: the range is zero");
}

#[test]
fn contradictions_in_the_description_are_refused() {
    for (from, to, expected) in [
        (r#""rows":60"#, r#""rows":61"#, "the histogram is not one of"),
        (r#""rows":60"#, r#""rows":0"#, "0 rows in 3 windows"),
        (r#""rows":60"#, r#""rows":9223372036854775809"#, "rows in 3 windows"),
        (r#""windows":3"#, r#""windows":4"#, "60 rows in 4 windows, but the table has read 3"),
        (r#""starts":[1,2,3]"#, r#""starts":[1,3,2]"#, "texts: must have windows"),
        (r#""starts":[1,2,3]"#, r#""starts":[]"#, "texts: must have windows"),
        (r#"["k","q","v"]"#, r#"["k","down","v"]"#, "down: is named twice"),
        (r#"["k","q","v"]"#, r#"["k","v","q"]"#, "ascending order"),
        (r#"["k","q","v"]"#, "[]", "a site must have the names"),
    ] {
        let problem = problem_of_edited(|p| {
            assert!(p.entry().contains(from), "{}", p.entry());
            *p.entry() = p.entry().replace(from, to);
        });
        assert!(problem.to_string().contains(expected), "{to}: {problem}");
    }
}
