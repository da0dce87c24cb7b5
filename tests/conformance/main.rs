//! Every golden case against every implementation, as one table.
//!
//! The cases are those of `tests/goldens` and, if the environment variable `ACCORDION_GOLDENS` names a folder, those in its
//! subfolders `homer`, `rcc` and `sharedllm` too. A case that cannot be read is a failure. The table goes to standard error
//! past the test harness's capture, because a pass with its worst error says more than `ok`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compare;
mod graphs;
mod reference;

use accordion::goldens::HomerCase;
use accordion::tensor::Tensor;
use accordion_graphs::plan::homer::HomerPlan;
use compare::{Comparison, Verdict};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Something that computes what the golden files hold. One row of the table per case.
trait Implementation {
    /// As the table shows it.
    fn name(&self) -> &'static str;

    /// Runs the whole case and returns everything it computed, by golden name.
    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> anyhow::Result<BTreeMap<String, Tensor>>;

    /// Whether it is defined for the case; a row says where it is not.
    fn supports(&self, _case: &HomerCase) -> bool {
        true
    }

    /// Whether the golden tensor `name` is something that this implementation never materialises. All others are
    /// compared, and missing ones are failures.
    fn omits(&self, _name: &str) -> bool {
        false
    }
}

fn implementations() -> Vec<Box<dyn Implementation>> {
    let graphs = graphs::Graphs::all().into_iter().map(|g| Box::new(g) as Box<dyn Implementation>);
    std::iter::once(Box::new(reference::Reference) as Box<dyn Implementation>).chain(graphs).collect()
}

/// The folders that hold golden cases: ours, and the one that the environment names.
fn golden_folders() -> Vec<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    std::iter::once(ours).chain(std::env::var_os("ACCORDION_GOLDENS").map(PathBuf::from)).collect()
}

#[test]
fn every_implementation_reproduces_the_goldens() {
    let mut table = Table::default();
    for folder in golden_folders() {
        line(&format!("goldens in {}", folder.display()));
        let methods = ["homer", "rcc", "sharedllm"].map(|method| (method, folder.join(method)));
        if !methods.iter().any(|(_, folder)| folder.is_dir()) {
            table.failure("has none of the subfolders homer, rcc, sharedllm");
        }
        for (method, folder) in methods.iter().filter(|(_, folder)| folder.is_dir()) {
            match *method {
                "homer" => homer_cases(&mut table, folder),
                _ => line(&format!("  {method}: no implementation yet")),
            }
        }
    }
    assert!(table.failures == 0, "{} of {} rows failed, see the table above", table.failures, table.rows);
}

fn homer_cases(table: &mut Table, folder: &Path) {
    let cases = HomerCase::find(folder).unwrap_or_default();
    if cases.is_empty() {
        table.failure(&format!("no case in {}", folder.display()));
    }
    for path in cases {
        match HomerCase::open(&path) {
            Ok(case) => homer_case(table, &case),
            Err(error) => table.failure(&format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

fn homer_case(table: &mut Table, case: &HomerCase) {
    let plan = match compare::plan(case) {
        Ok(plan) => plan,
        Err(difference) => return table.failure(&format!("homer {}: plan: {difference}", case.name)),
    };
    table.row(&case.name, "plan", &format!("{} nodes as the authors ran them: PASS", plan.nodes.len()));
    for mut implementation in implementations() {
        let name = implementation.name();
        if !implementation.supports(case) {
            table.row(&case.name, name, "not defined for this architecture");
            continue;
        }
        match implementation.homer(case, &plan) {
            Ok(found) => {
                let comparison = compare::homer(case, &found, &|tensor| implementation.omits(tensor));
                table.comparison(&case.name, name, &comparison);
            }
            Err(error) => table.failure(&format!("homer {} {name}: {error:#}", case.name)),
        }
    }
}

/// `eprintln!` would be captured by the harness; the handle is not.
fn line(line: &str) {
    writeln!(std::io::stderr().lock(), "{line}").unwrap();
}

/// Prints as it goes, so that a crash leaves the rows before it visible.
#[derive(Default)]
struct Table {
    rows: usize,
    failures: usize,
}

impl Table {
    fn row(&mut self, case: &str, implementation: &str, result: &str) {
        self.rows += 1;
        line(&format!("  homer {case:<3} {implementation:<24} {result}"));
    }

    fn failure(&mut self, message: &str) {
        self.rows += 1;
        self.failures += 1;
        line(&format!("  FAIL {message}"));
    }

    fn comparison(&mut self, case: &str, implementation: &str, comparison: &Comparison) {
        self.row(case, implementation, &comparison.to_string());
        self.failures += usize::from(comparison.verdict() == Verdict::Fail);
        for finding in comparison.findings() {
            line(&format!("      {finding}"));
        }
    }
}
