//! RCC's rows: the plan against the padded ids of the authors' code, then everything that it computed.

use super::compare::{Bound, Comparison, Tensors, coarser, integers};
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
    let ties: Vec<(String, String)> = match implementation.dtype() {
        DType::F32 => Vec::new(),
        dtype => case.runs.iter().filter_map(|run| tied_token(case, found, &run.name, dtype)).collect(),
    };
    for (name, expected) in case.expected.iter().filter(|(name, _)| !is_planned(name) && !implementation.omits(name)) {
        let after_tie = ties.iter().any(|(run, _)| {
            name.strip_prefix(&format!("{run}/")).is_some_and(|part| AFTER_TOKENS.iter().any(|p| part.starts_with(p)))
        });
        if after_tie {
            result.skip();
            continue;
        }
        result.compare(name, expected, found, bound(case.dtype_of(name), implementation.dtype()));
    }
    for (_, tie) in ties {
        result.ambiguous(tie);
    }
    result
}

/// What follows from the tokens that were generated.
const AFTER_TOKENS: [&str; 3] = ["generated", "step_", "final_kv"];

/// The run, and the first token of it that was generated otherwise than expected, where their logits are within twice the noise of
/// `dtype`.
fn tied_token(case: &RccCase, found: &Tensors, run: &str, dtype: DType) -> Option<(String, String)> {
    let named = |tensors: &Tensors, name: &str| tensors.get(&format!("{run}/{name}")).cloned();
    let tokens = |tensors: &Tensors| integers(&named(tensors, "generated")?);
    let (expected, found) = (tokens(&case.expected)?, tokens(found)?);
    let step = expected.iter().zip(&found).position(|(e, f)| e != f)?;
    let logits = named(&case.expected, if step == 0 { "prefill_logits" } else { "step_logits" })?;
    let vocabulary = *logits.shape().last()?;
    let row = if step == 0 { (logits.len() / vocabulary).checked_sub(1)? } else { step - 1 };
    let values = logits.to_f32();
    let logit = |token: i64| values.get(row * vocabulary + usize::try_from(token).ok()?).copied();
    let gap = logit(expected[step])? - logit(found[step])?;
    let finding =
        format!("{run}/generated: {} instead of {} at step {step}, {gap:.2e} apart", found[step], expected[step]);
    (gap.abs() <= Bound::steps(dtype, 11.4).of(&values)).then(|| (run.to_owned(), finding))
}

/// Half precision: an `f32` computation from rounded weights differs from the golden by up to 3.4 of the type's rounding steps
/// at the tensor's largest magnitude (`step_logits`); twice that is allowed, and the same ids are expected. What computes in half
/// precision is off by more, and allowed what HOMER's goldens are.
fn bound(golden: DType, implementation: DType) -> Bound {
    let steps = if implementation == DType::F32 { 7.0 } else { 20.0 };
    Bound::steps(coarser(golden, implementation), steps)
}
