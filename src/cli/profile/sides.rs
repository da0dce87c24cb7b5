//! Two sides measured alternately, each in a process that lives as long as the comparison: both are warm, and each has
//! memory of its own.

use super::super::engine::EngineArguments;
use super::super::method::MethodName;
use super::super::output::Output;
use super::super::text::grouped;
use super::{Arguments, Case, model_name, model_names};
use accordion::bundle::Bundle;
use accordion::environment::Provenance;
use accordion::profile::ceilings::Ceilings;
use accordion::profile::measure::work;
use accordion::profile::paired::{Comparison, merged, turns};
use accordion::profile::schema::{Measurement, ProfileReport};
use accordion_graphs::plan::PromptLengths;
use anyhow::{Context, bail, ensure};

/// What is measured on one side.
struct Side<'b> {
    name: String,
    bundle: &'b Bundle,
    method: MethodName,
    engine: EngineArguments,
}

/// The first turn of each side, the pairs, and the rates in each process.
struct Alternated {
    cold: [Measurement; 2],
    pairs: Vec<[Measurement; 2]>,
    rates: [Option<Ceilings>; 2],
}

impl Arguments {
    /// Measures the two sides at every length.
    pub(super) fn compare_sides(&self, bundles: &[Bundle], output: &Output) -> anyhow::Result<ProfileReport> {
        let sides = self.sides(bundles)?;
        let mut planned = Vec::new();
        for &context in &self.context {
            ensure!(context > 0, "--context 0: expected at least 1 token");
            let lengths = PromptLengths { prefix: self.prefix, context, suffix: self.suffix };
            let case = |side: &Side<'_>| {
                let compression = self.compression(side.bundle, side.method)?;
                work(side.bundle, &compression, lengths)?;
                self.tokens(side.bundle, lengths)?;
                anyhow::Ok(compression)
            };
            planned.push((lengths, [case(&sides[0])?, case(&sides[1])?]));
        }
        let (mut comparisons, mut measurements) = (Vec::new(), Vec::new());
        for (lengths, compressions) in planned {
            let [a, b] = compressions;
            let cases = [(&sides[0], a), (&sides[1], b)].map(|(side, compression)| {
                let bundle = side.bundle;
                (side, Case { bundle, compression, lengths })
            });
            let Alternated { cold, pairs, rates } = self.alternate(&cases, output)?;
            let names = [0, 1].map(|side| sides[side].name.clone());
            comparisons.push(Comparison::new(names, lengths, &pairs));
            for (number, (side, _)) in cases.iter().enumerate() {
                let own: Vec<Measurement> = pairs.iter().map(|pair| pair[number].clone()).collect();
                let mut whole = merged(&cold[number], &own).context("no pair was measured")?;
                let letter = if number == 0 { "A" } else { "B" };
                whole.configuration.settings.push(("side".to_owned(), format!("{letter}: {}", side.name)));
                measurements.push(match rates[number] {
                    Some(rates) => whole.bounded_by(rates),
                    None => whole,
                });
            }
        }
        let environment = Provenance::probe().pairs();
        let profile = ProfileReport::new(model_names(bundles), environment, &measurements, Vec::new());
        Ok(profile.with_comparisons(comparisons))
    }

    /// One turn of each side that is not counted, and the turns that are, `[A, B]` per pair.
    fn alternate(&self, cases: &[(&Side<'_>, Case<'_>); 2], output: &Output) -> anyhow::Result<Alternated> {
        let start = |(side, case): &(&Side<'_>, Case<'_>)| self.start(case, &side.engine, output);
        let mut processes = [start(&cases[0])?, start(&cases[1])?];
        let cold = [processes[0].measure()?, processes[1].measure()?];
        let bar = output.bar("pairs", self.pairs as u64);
        bar.set_message(format!("pairs at {}", grouped(cases[0].1.lengths.context as u64)));
        let mut pairs = Vec::with_capacity(self.pairs);
        for [first, second] in turns(self.pairs) {
            let (earlier, later) = (processes[first].measure()?, processes[second].measure()?);
            pairs.push(if first == 0 { [earlier, later] } else { [later, earlier] });
            bar.inc(1);
        }
        bar.finish_and_clear();
        // On the machine as it has just been.
        let rates = [processes[0].rates()?, processes[1].rates()?];
        Ok(Alternated { cold, pairs, rates })
    }

    /// The two sides that the arguments name.
    fn sides<'b>(&self, bundles: &'b [Bundle]) -> anyhow::Result<[Side<'b>; 2]> {
        let [first, second] = match bundles {
            [one] => [one, one],
            [one, other] => [one, other],
            _ => bail!("--paired compares two bundles, or one in two ways; {} were given", bundles.len()),
        };
        let asked = match self.methods[..] {
            [] => [None, None],
            [both] => [Some(both), Some(both)],
            [a, b] => [Some(a), Some(b)],
            _ => bail!("--paired takes one of --methods for both sides, or one for each"),
        };
        let alike = bundles.len() == 1 && asked[0] == asked[1] && self.against_operators.is_none();
        ensure!(
            !alike,
            "--paired with one bundle: give a second one (the same again to see what cannot be told apart), two --methods, \
             or --against-operators"
        );
        let side = |bundle, asked, engine: EngineArguments| {
            let method = MethodName::choose(asked, bundle)?;
            let name = format!("{}, {}, {} operators", model_name(bundle), method.name(), engine.operators());
            anyhow::Ok(Side { name, bundle, method, engine })
        };
        let engine = self.engine.with_operators(self.against_operators);
        Ok([side(first, asked[0], self.engine.clone())?, side(second, asked[1], engine)?])
    }
}
