//! A planted fault.

use accordion::runtime::steps::{MaybeSteps, StepCall};
use accordion::runtime::{Engine, EngineError, InPlace, Loader};
use accordion::tensor::Tensor;

/// A loader whose fused `TopKPrune` keeps the best row that it should drop in place of the best that it should keep.
pub(crate) struct SecondBest<L>(pub(crate) L);

struct Faulty(Box<dyn Engine>);

impl<L: Loader> Loader for SecondBest<L> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let engine = self.0.load(name, bytes, weights)?;
        Ok(if name == "TopKPrune" { Box::new(Faulty(engine)) } else { engine })
    }

    fn name(&self) -> &'static str {
        self.0.name()
    }
}

impl Engine for Faulty {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let mut results = self.0.run(inputs, in_place, outputs)?;
        let at = |name| outputs.iter().position(|output| *output == name).unwrap();
        let scores = results[at("scores")].to_f32();
        let kept = results[at("keep_idx")].clone().on_host().unwrap();
        let mut rows = kept.as_i64().unwrap().to_vec();
        let best = |rows: &mut dyn Iterator<Item = i64>| {
            // Affixes score infinity, and stay.
            let finite = rows.filter(|&row| scores[row as usize].is_finite());
            finite.max_by(|&a, &b| scores[a as usize].total_cmp(&scores[b as usize])).unwrap()
        };
        let [wrong, right] =
            [best(&mut (0..scores.len() as i64).filter(|row| !rows.contains(row))), best(&mut rows.iter().copied())];
        *rows.iter_mut().find(|row| **row == right).unwrap() = wrong;
        rows.sort_unstable();
        results[at("keep_idx")] = Tensor::from_i64(kept.shape(), rows).unwrap();
        Ok(results)
    }

    fn steps(&mut self, call: &StepCall<'_>) -> MaybeSteps {
        self.0.steps(call)
    }
}
