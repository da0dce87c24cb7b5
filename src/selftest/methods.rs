//! What every method costs beside plain, which reads the whole context: latency and device memory on the same engine.
//!
//! Formulas, as HOMER's authors count: with *t* the time of a prefix, a first token and all others up to *n* new ones, at the
//! medians, the speed-up is `t(plain) / t(method) - 1` and the memory saving `1 - peak(method) / peak(plain)`, both in percent.

use super::models::{Maker, Subject};
use super::schema::{AgainstPlain, MethodCost, SpeedUp};
use crate::profile::schema::{BASELINE, Measurement};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Numbers of new tokens that speed-ups are counted with: those of HOMER's authors.
const NEW_TOKENS: [usize; 3] = [20, 50, 100];

/// What plain's caches take on a device while one grows, in sizes of one: what is read, what is written, and one cast.
const CACHES: u64 = 3;
/// What attention, logits and libraries may take beside weights and caches.
const BESIDE: u64 = 4 << 30;

/// Which methods to measure, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Their names.
    pub methods: Vec<&'static str>,
    /// Tokens of the context.
    pub context: usize,
    /// Tokens of RCC's longest context, if it is wanted.
    pub longest: Option<usize>,
    /// Bytes of the device that are free; none where that does not matter.
    pub free_bytes: Option<u64>,
    /// How long all of it may take. What is not begun by then is left out.
    pub budget: Duration,
}

/// One method of one bundle at one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The model by name.
    pub model: &'static str,
    /// The method.
    pub method: &'static str,
    /// A bundle that has it.
    pub bundle: PathBuf,
    /// Tokens of the context.
    pub context: usize,
}

impl Case {
    /// In words.
    pub fn name(&self) -> String {
        format!("{} of {} at {} tokens", self.method, self.model, self.context)
    }
}

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Latency.
    pub measurement: Measurement,
    /// The most that the device's memory held beyond what it held before; none where that is not known.
    pub peak_device_bytes: Option<u64>,
}

/// Measures a case within a time, or says why that cannot be done.
pub type Measure<'a> = dyn FnMut(&Case, Duration) -> Result<Measured, String> + 'a;

/// Makes the models and measures all methods of `wanted`, each as `measure` does. What cannot be made or measured, and what there
/// is no time or memory for, becomes a line of `missing`. `on_step` hears what comes next.
pub fn run(
    maker: &Maker<'_>,
    wanted: &Wanted,
    measure: &mut Measure<'_>,
    missing: &mut Vec<String>,
    on_step: &mut dyn FnMut(&str),
) -> Vec<MethodCost> {
    let begin = Instant::now();
    let mut costs: Vec<MethodCost> = Vec::new();
    let mut comparable: BTreeMap<&str, usize> = BTreeMap::new();
    for method in ["homer", "sharedllm", "rcc"] {
        let own = wanted.methods.contains(&method);
        // Without HOMER its bundle has the decoder that plain runs; RCC's plain is only what RCC is compared with.
        let plain = method != "sharedllm" && wanted.methods.contains(&BASELINE);
        let needed = own || (plain && method == "homer");
        if !needed {
            continue;
        }
        on_step(&format!("writing {method}'s model"));
        let subject = match maker.subject(method) {
            Ok(subject) => subject,
            Err(error) => {
                missing.push(format!("{method}: its bundle cannot be made: {error}"));
                continue;
            }
        };
        // HOMER's bundle says it for SharedLLM's, which has the same decoder.
        let comparable = *comparable.entry(subject.model).or_insert_with(|| wanted.comparable(&subject, missing));
        for case in wanted.cases(&subject, own, plain, comparable) {
            let left = wanted.budget.saturating_sub(begin.elapsed());
            if left.is_zero() {
                missing.push(format!("{}: the budget of {} s is used up", case.name(), wanted.budget.as_secs()));
                continue;
            }
            on_step(&case.name());
            match measure(&case, left) {
                Ok(measured) => costs.push(cost(&case, &measured)),
                Err(problem) => missing.push(format!("{}: {problem}", case.name())),
            }
        }
    }
    compare(&mut costs);
    costs
}

impl Wanted {
    /// What to measure of a bundle: at the context that can be compared, at the one asked for, and RCC at its longest.
    fn cases(&self, subject: &Subject, own: bool, plain: bool, comparable: usize) -> Vec<Case> {
        let case = |method, context| subject.case(method, context);
        let mut cases = Vec::new();
        if plain {
            cases.push(case(BASELINE, comparable));
        }
        if own {
            let mut contexts = vec![comparable, self.context];
            contexts.extend(self.longest.filter(|_| subject.method == "rcc"));
            contexts.dedup();
            cases.extend(contexts.into_iter().map(|context| case(subject.method, context)));
        }
        cases
    }

    /// The context that methods are compared at: that asked for, or the longest one at which plain fits into the memory.
    fn comparable(&self, subject: &Subject, missing: &mut Vec<String>) -> usize {
        let longest = self.longest_plain(subject);
        if longest < self.context {
            missing.push(format!(
                "{}: it would take about {} bytes of the device, and {} are free; compared at {longest} tokens instead",
                subject.case(BASELINE, self.context).name(),
                plain_bytes(subject, self.context),
                self.free_bytes.unwrap_or_default(),
            ));
        }
        longest
    }

    /// The context, halved until plain fits into the device's memory.
    fn longest_plain(&self, subject: &Subject) -> usize {
        let Some(free) = self.free_bytes.filter(|_| self.methods.contains(&BASELINE)) else { return self.context };
        let halves = std::iter::successors(Some(self.context), |context| (*context > 1).then_some(context / 2));
        halves.into_iter().find(|&context| plain_bytes(subject, context) <= free).unwrap_or(self.context)
    }
}

impl Subject {
    fn case(&self, method: &'static str, context: usize) -> Case {
        Case { model: self.model, method, bundle: self.bundle.clone(), context }
    }
}

/// About what plain takes of a device.
fn plain_bytes(subject: &Subject, context: usize) -> u64 {
    let caches = subject.kv_bytes_per_token.saturating_mul(context as u64).saturating_mul(CACHES);
    subject.weight_bytes.saturating_add(caches).saturating_add(BESIDE)
}

fn cost(case: &Case, measured: &Measured) -> MethodCost {
    let Measured { measurement, peak_device_bytes } = measured;
    MethodCost {
        model: case.model.to_owned(),
        method: case.method.to_owned(),
        engine: measurement.configuration.engine.clone(),
        context: case.context,
        tokens_kept: measurement.tokens_kept,
        runs: measurement.prefix.runs,
        prefix_ms: measurement.prefix.median_ms,
        first_token_ms: measurement.first_token.median_ms,
        per_token_ms: measurement.per_token.median_ms,
        state_bytes: measurement.state_bytes,
        peak_device_bytes: *peak_device_bytes,
        peak_resident_bytes: measurement.peak_resident_bytes,
        against_plain: None,
    }
}

/// Says what follows from plain on the same model at the same context.
fn compare(costs: &mut [MethodCost]) {
    let plain: Vec<MethodCost> = costs.iter().filter(|cost| cost.method == BASELINE).cloned().collect();
    for cost in costs.iter_mut().filter(|cost| cost.method != BASELINE) {
        let base = plain.iter().find(|base| base.model == cost.model && base.context == cost.context);
        cost.against_plain = base.map(|base| cost.against(base));
    }
}

impl MethodCost {
    /// Milliseconds until `new_tokens` have been decoded.
    pub fn milliseconds(&self, new_tokens: usize) -> f64 {
        self.prefix_ms + self.first_token_ms + new_tokens.saturating_sub(1) as f64 * self.per_token_ms
    }

    fn against(&self, plain: &Self) -> AgainstPlain {
        let speed_up = |new_tokens| SpeedUp {
            new_tokens,
            percent: 100.0 * (plain.milliseconds(new_tokens) / self.milliseconds(new_tokens) - 1.0),
        };
        let peaks = self.peak_device_bytes.zip(plain.peak_device_bytes.filter(|peak| *peak > 0));
        AgainstPlain {
            prefix_ratio: plain.prefix_ms / self.prefix_ms,
            speed_up: NEW_TOKENS.map(speed_up).to_vec(),
            memory_saving_percent: peaks.map(|(own, plain)| 100.0 * (1.0 - own as f64 / plain as f64)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn cost(method: &str, prefix_ms: f64, per_token_ms: f64, peak: Option<u64>) -> MethodCost {
        MethodCost {
            model: "m".to_owned(),
            method: method.to_owned(),
            engine: "e".to_owned(),
            context: 8,
            tokens_kept: 8,
            runs: 1,
            prefix_ms,
            first_token_ms: 10.0,
            per_token_ms,
            state_bytes: 1,
            peak_device_bytes: peak,
            peak_resident_bytes: 1,
            against_plain: None,
        }
    }

    #[test]
    fn speed_up_and_saving_are_those_of_the_formula() {
        let mut costs = [cost("homer", 1000.0, 10.0, Some(16)), cost("plain", 4000.0, 20.0, Some(64))];
        compare(&mut costs);
        let found = costs[0].against_plain.as_ref().unwrap();
        assert!((found.prefix_ratio - 4.0).abs() < 1e-9);
        // 4000 + 10 + 99 * 20 over 1000 + 10 + 99 * 10.
        let last = found.speed_up.last().unwrap();
        assert_eq!(last.new_tokens, 100);
        assert!((last.percent - 100.0 * (5990.0 / 2000.0 - 1.0)).abs() < 1e-9, "{last:?}");
        assert!((found.memory_saving_percent.unwrap() - 75.0).abs() < 1e-9);
        assert_eq!(costs[1].against_plain, None);
        let mut apart = [cost("homer", 1.0, 1.0, None), MethodCost { context: 9, ..cost("plain", 1.0, 1.0, None) }];
        compare(&mut apart);
        assert_eq!(apart[0].against_plain, None);
    }

    #[test]
    fn plain_is_measured_at_the_longest_context_that_fits() {
        let subject = Subject {
            model: "m",
            method: "rcc",
            bundle: PathBuf::new(),
            weight_bytes: 1 << 30,
            kv_bytes_per_token: 1 << 20,
        };
        let wanted = |free_bytes| Wanted {
            methods: vec!["plain", "rcc"],
            context: 32_768,
            longest: Some(1 << 20),
            free_bytes,
            budget: Duration::ZERO,
        };
        let cases = |free_bytes, missing: &mut Vec<String>| -> Vec<(&str, usize)> {
            let wanted = wanted(free_bytes);
            let cases = wanted.cases(&subject, true, true, wanted.comparable(&subject, missing));
            cases.iter().map(|case| (case.method, case.context)).collect()
        };
        let mut missing = Vec::new();
        let all = [("plain", 32_768), ("rcc", 32_768), ("rcc", 1 << 20)];
        assert_eq!(cases(None, &mut missing), all);
        assert_eq!(cases(Some(200 << 30), &mut missing), all);
        assert!(missing.is_empty());
        let found = cases(Some(60 << 30), &mut missing);
        assert_eq!(found, [("plain", 16_384), ("rcc", 16_384), ("rcc", 32_768), ("rcc", 1 << 20)]);
        assert!(missing[0].contains("plain of m at 32768 tokens") && missing[0].contains("16384"), "{missing:?}");
    }
}
