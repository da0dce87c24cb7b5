//! RCC's rows: the plan against the padded ids of the authors' code, then everything that it computed.

use super::compare::{Bound, Comparison, Tensors, coarser};
use super::table::Table;
use super::{Implementation, implementations};
use accordion::goldens::RccCase;
use accordion::verify::golden::rcc::is_planned;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccPlan;
use std::path::Path;

/// Every case of `folder`.
pub(crate) fn cases(table: &mut Table, folder: &Path) {
    let cases = RccCase::find(folder).unwrap_or_default();
    if cases.is_empty() {
        table.failure(&format!("no case in {}", folder.display()));
    }
    for path in cases {
        match RccCase::open(&path) {
            Ok(case) => one_case(table, &case),
            Err(error) => table.failure(&format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

fn one_case(table: &mut Table, case: &RccCase) {
    match plans(case) {
        Ok(result) => table.row("rcc", &case.name, "plan", &result),
        Err(difference) => return table.failure(&format!("rcc {}: plan: {difference}", case.name)),
    }
    for mut implementation in implementations() {
        let name = implementation.name();
        match implementation.rcc(case) {
            Ok(found) => table.comparison("rcc", &case.name, name, &compare(case, &found, implementation.as_ref())),
            Err(error) => table.not_run("rcc", &case.name, name, &error),
        }
    }
}

/// What lengths alone decide: every run's padded ids, and the number of slots before its prompt.
fn plans(case: &RccCase) -> Result<String, String> {
    for run in &case.runs {
        // Runs that repeat another one in another precision record no inputs.
        let Some(expected) = case.expected.get(&format!("{}/padded_id", run.name)) else { continue };
        let plan = RccPlan::new(run.lengths(), case.settings).map_err(|e| format!("{}: {e}", run.name))?;
        let padded: Vec<i64> = (0..plan.segments).flat_map(|s| plan.segment(&run.text_ids, s)).map(i64::from).collect();
        if expected.as_i64() != Ok(&padded) {
            return Err(format!("{}: the padded ids are {padded:?}, expected {expected:?}", run.name));
        }
        let rows = vec![i64::from(case.placeholder_id); plan.slots].into_iter();
        let rows: Vec<i64> = rows.chain(run.prompt_ids.iter().copied().map(i64::from)).collect();
        if case.expected[&format!("{}/dec_input_ids", run.name)].as_i64() != Ok(&rows) {
            return Err(format!("{}: the decoder's rows are {rows:?}", run.name));
        }
    }
    for raising in &case.raising {
        // A text that divides the window: it is tiled without padding.
        let lengths = PromptLengths { prefix: 0, context: raising.text_len, suffix: raising.prompt_len };
        let plan = RccPlan::new(lengths, case.settings).map_err(|e| format!("{}: {e}", raising.name))?;
        if (plan.repeats * raising.text_len, plan.front.len()) != (case.settings.window, 0) {
            return Err(format!("{}: {plan:?}, expected tiles of the text alone", raising.name));
        }
    }
    let raising = match case.raising.len() {
        0 => String::new(),
        n => format!(", {n} that they cannot pad are tiled"),
    };
    Ok(format!("{} texts padded as the authors pad them{raising}: PASS", case.runs.len()))
}

fn compare(case: &RccCase, found: &Tensors, implementation: &dyn Implementation) -> Comparison {
    let half = case.runs.iter().any(|run| run.dtype != DType::F32);
    let mut result = Comparison::new(if half { ", in part half precision golden" } else { "" });
    for (name, expected) in case.expected.iter().filter(|(name, _)| !is_planned(name) && !implementation.omits(name)) {
        result.compare(name, expected, found, bound(case.dtype_of(name), implementation.dtype()));
    }
    result
}

/// Half precision: an `f32` computation from rounded weights differs from the golden by up to 3.4 of the type's rounding steps
/// at the tensor's largest magnitude (`step_logits`); twice that is allowed, and the same ids are expected. What computes in half
/// precision is off by more, and allowed what HOMER's goldens are.
fn bound(golden: DType, implementation: DType) -> Bound {
    let steps = if implementation == DType::F32 { 7.0 } else { 20.0 };
    Bound::steps(coarser(golden, implementation), steps)
}
