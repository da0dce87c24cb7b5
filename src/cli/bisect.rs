//! `accordion verify BUNDLE --bisect` and `--cumulative`.

use super::Outcome;
use super::engine::EngineArguments;
use super::output::Output;
use accordion::bisect::bundle::{cases, count};
use accordion::bisect::case::Visit;
use accordion::bisect::culprit::Culprit;
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::terms::Terms;
use accordion::bisect::{by_part, cumulative, reproducer, search};
use accordion::bundle::Bundle;
use accordion::verify::bundle::Input;
use accordion::verify::{Detail, Findings};
use accordion_graphs::precision::Precision;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Whether and how a fault is looked for.
#[derive(Debug, Args)]
#[command(next_help_heading = "Bisection")]
pub(crate) struct BisectArguments {
    /// Find the first wrong tap in few runs, and the nodes that are to blame
    #[arg(long, requires = "bundle", conflicts_with_all = ["golden", "record", "against", "samples"])]
    bisect: bool,
    /// Write the nodes, their inputs and what should come out into this new folder, for any ONNX runtime
    #[arg(long, value_name = "DIR", requires = "bisect")]
    reproducer: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report<'a> {
    schema: &'static str,
    culprit: Option<&'a Culprit>,
}

impl BisectArguments {
    /// Whether a fault is looked for.
    pub(crate) fn wanted(&self) -> bool {
        self.bisect
    }

    /// Looks for the first wrong tap of `bundle` on `input`. The check has failed if there is one.
    pub(crate) fn run(
        &self,
        bundle: &Bundle,
        input: &Input<'_>,
        engine: &EngineArguments,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        let rebuilt = Rebuilt::new(bundle)?;
        let loader = engine.ort_cpu("--bisect", bundle, output)?;
        let bar = output.bar("Searching", count(input) as u64);
        let mut on_case = |done| bar.set_position(done as u64);
        let all = |visit: &mut Visit<'_>| cases(&rebuilt, input, visit);
        let found = match bundle.manifest().precision {
            Precision::Fp32 => search::first_wrong(&loader, &mut on_case, all)?,
            _ => by_part::first_wrong(&loader, &Terms::of(bundle), &mut on_case, all)?,
        };
        bar.finish_and_clear();
        if let (Some(found), Some(folder)) = (&found, &self.reproducer) {
            reproducer::write(&rebuilt, found, folder, false)?;
            output.remark(format!("{} shows the difference; its README.md says how", folder.display()));
        }
        let culprit = found.as_ref().map(|found| &found.culprit);
        let report = Report { schema: "accordion.bisect/1", culprit };
        output.result(&report, || match culprit {
            Some(culprit) => reproducer::summary(culprit),
            None if bundle.manifest().precision == Precision::Fp32 => {
                "every output of every graph is within its bounds\n".to_owned()
            }
            None => "every part of every graph is right on the reference's values, and every linear layer by itself\n"
                .to_owned(),
        })?;
        Ok(if culprit.is_some() { Outcome::CheckFailed } else { Outcome::Done })
    }
}

/// Judges every part of the graphs of `bundle` on the reference's values.
pub(crate) fn part_by_part(
    bundle: &Bundle,
    input: &Input<'_>,
    detail: Detail,
    engine: &EngineArguments,
    output: &Output,
) -> anyhow::Result<Findings> {
    let rebuilt = Rebuilt::new(bundle)?;
    let loader = engine.ort_cpu("--cumulative", bundle, output)?;
    let bar = output.bar("Comparing part by part", count(input) as u64);
    let mut on_case = |done| bar.set_position(done as u64);
    let all = |visit: &mut Visit<'_>| cases(&rebuilt, input, visit);
    let findings = cumulative::compare(&loader, &Terms::of(bundle), detail, &mut on_case, all)?;
    bar.finish_and_clear();
    Ok(findings)
}
