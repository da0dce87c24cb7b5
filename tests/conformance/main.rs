//! Every golden case against every implementation, as one table.
//!
//! The cases are those of `tests/goldens` and, if the environment variable `ACCORDION_GOLDENS` names a folder, those in its
//! subfolders `homer`, `rcc` and `sharedllm` too. A case that cannot be read is a failure. The table goes to standard error
//! past the test harness's capture, because a pass with its worst error says more than `ok`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compare;
mod graphs;
mod graphs_sharedllm;
mod homer;
mod rcc;
mod rcc_lockstep;
mod reference;
mod sharedllm;
mod table;

use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use compare::Tensors;
use std::path::{Path, PathBuf};
use table::{Table, line};

/// Why an implementation has no result for a case, where that is not a failure.
#[derive(Debug)]
struct NotDefined(&'static str);

impl std::fmt::Display for NotDefined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for NotDefined {}

/// Something that computes what the golden files hold. One row of the table per case.
trait Implementation {
    /// As the table shows it.
    fn name(&self) -> &'static str;

    /// What it computes in.
    fn dtype(&self) -> DType {
        DType::F32
    }

    /// Runs the whole case and returns everything it computed, by golden name.
    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> anyhow::Result<Tensors>;

    /// Runs the whole case and returns everything it computed, by golden name. What it never materialises because it
    /// reaches nothing may be missing from a tensor, see [`part`](accordion::verify::golden::part).
    fn rcc(&mut self, _case: &RccCase) -> anyhow::Result<Tensors> {
        Err(NotDefined("no implementation").into())
    }

    /// Runs one variant of the whole case and returns everything it computed, by golden name.
    fn sharedllm(&mut self, _case: &SharedLlmCase, _quirks: Quirks) -> anyhow::Result<Tensors> {
        Err(NotDefined("no implementation").into())
    }

    /// As [`Self::omits`], of a SharedLLM case.
    fn omits_sharedllm(&self, _case: &SharedLlmCase, name: &str) -> bool {
        self.omits(name)
    }

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
                "homer" => homer::cases(&mut table, folder),
                "rcc" => rcc::cases(&mut table, folder),
                _ => sharedllm::cases(&mut table, folder),
            }
        }
    }
    assert!(table.failures == 0, "{} of {} rows failed, see the table above", table.failures, table.rows);
}
