//! The table that a run prints.

use super::NotDefined;
use super::compare::{Comparison, Verdict};
use std::io::Write;

/// `eprintln!` would be captured by the harness; the handle is not.
pub(crate) fn line(line: &str) {
    writeln!(std::io::stderr().lock(), "{line}").unwrap();
}

/// Prints as it goes, so that a crash leaves the rows before it visible.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) rows: usize,
    pub(crate) failures: usize,
}

impl Table {
    pub(crate) fn row(&mut self, method: &str, case: &str, implementation: &str, result: &str) {
        self.rows += 1;
        line(&format!("  {method} {case:<16} {implementation:<24} {result}"));
    }

    pub(crate) fn failure(&mut self, message: &str) {
        self.rows += 1;
        self.failures += 1;
        line(&format!("  FAIL {message}"));
    }

    pub(crate) fn comparison(&mut self, method: &str, case: &str, implementation: &str, comparison: &Comparison) {
        self.row(method, case, implementation, &comparison.to_string());
        self.failures += usize::from(comparison.verdict() == Verdict::Fail);
        for finding in comparison.findings() {
            line(&format!("      {finding}"));
        }
    }

    /// The row of an implementation that could not be run, which is a failure unless it says that it is not defined.
    pub(crate) fn not_run(&mut self, method: &str, case: &str, implementation: &str, error: &anyhow::Error) {
        match error.downcast_ref::<NotDefined>() {
            Some(NotDefined(why)) => self.row(method, case, implementation, why),
            None => self.failure(&format!("{method} {case} {implementation}: {error:#}")),
        }
    }
}
