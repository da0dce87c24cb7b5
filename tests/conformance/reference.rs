//! The reference as a row of the table.

use super::Implementation;
use super::compare::Tensors;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::verify::golden;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use anyhow::Result;

pub(crate) struct Reference;

impl Implementation for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
        Ok(golden::homer::reference(case, plan)?)
    }

    fn rcc(&mut self, case: &RccCase) -> Result<Tensors> {
        Ok(golden::rcc::reference(case)?)
    }

    fn sharedllm(&mut self, case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
        Ok(golden::sharedllm::reference(case, quirks)?)
    }
}

#[cfg(test)]
mod tests {
    use accordion::goldens::SharedLlmCase;
    use accordion::reference::sharedllm::{Prompt, RunningText, SharedLlm, compress};
    use accordion::taps::NoTaps;
    use accordion::verify::golden::sharedllm::plan;
    use accordion_graphs::plan::sharedllm::Quirks;
    use std::path::Path;

    /// Token by token and all at once are the same computation, unless single tokens are rotated otherwise (Q5).
    #[test]
    fn decoding_is_teacher_forcing_only_where_it_is_repaired() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm");
        let case = SharedLlmCase::open(&folder.join("case_far10.json")).unwrap();
        let model = SharedLlm::load(&case.architecture, &case.model, |name| case.weight(name)).unwrap();
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let (context, mask, running) = (&case.context_ids, &case.context_mask, &case.running_ids);
            let prompt = Prompt { context, mask, running, query_index: case.query_index };
            let injected = compress(&model, &plan(&case, quirks).unwrap(), prompt, &mut NoTaps).unwrap();
            let at_once = RunningText::new(&model, &injected).feed(&model, &case.teacher_ids, &mut NoTaps).unwrap();
            let mut text = RunningText::new(&model, &injected);
            let (prompt, rest) = case.teacher_ids.split_at(running.len());
            text.feed(&model, prompt, &mut NoTaps).unwrap();
            for (row, &id) in (prompt.len()..).zip(rest) {
                let stepwise = text.feed(&model, &[id], &mut NoTaps).unwrap();
                let off = (&stepwise.row(0) - &at_once.row(row)).fold(0.0_f32, |worst, e| worst.max(e.abs()));
                match quirks {
                    Quirks::Faithful => assert!(off > 0.5, "token {row}: only {off} apart"),
                    Quirks::Fixed => assert!(off < 1e-4, "token {row}: {off} apart"),
                }
            }
        }
    }
}
