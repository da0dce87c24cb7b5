//! `accordion verify BUNDLE --bisect`.

use super::Outcome;
use super::common::EngineArguments;
use super::output::Output;
use accordion::bisect::homer::bisect_homer;
use accordion::bisect::plain::bisect_plain;
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::reproducer;
use accordion::bisect::search::Culprit;
use accordion::bundle::Bundle;
use accordion::reference::homer::Prompt;
use accordion::reference::llama::Llama;
use accordion::reference::transformer;
use accordion_graphs::plan::homer::HomerPlan;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Rows of the decoder that are searched where a tree in front of it is right.
const DECODER_ROWS: usize = 64;

/// Whether and how a fault is looked for.
#[derive(Debug, Args)]
#[command(next_help_heading = "Bisection")]
pub(crate) struct BisectArguments {
    /// Find the first wrong tap in few runs, and the nodes that are to blame
    #[arg(long, requires = "bundle", conflicts_with = "golden")]
    bisect: bool,
    /// Write the nodes, their inputs and what should come out into this new folder, for any ONNX runtime
    #[arg(long, value_name = "DIR", requires = "bisect")]
    reproducer: Option<PathBuf>,
}

/// What both sides are given.
pub(crate) enum Asked<'a> {
    /// Token ids that the decoder reads.
    Plain(&'a [u32]),
    /// A prompt, its tree, and the significance table, one row per layer.
    Homer(&'a HomerPlan, Prompt<'a>, &'a [Vec<f32>]),
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

    /// Looks for the first wrong tap of `bundle` on what is `asked`. The check has failed if there is one.
    pub(crate) fn run(
        &self,
        bundle: &Bundle,
        asked: &Asked<'_>,
        engine: &EngineArguments,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        let source = |name: &str| bundle.weights().tensor(name);
        let rebuilt = Rebuilt::new(bundle)?;
        let loader = engine.loader(bundle, output)?;
        let found = match *asked {
            Asked::Plain(ids) => {
                let reference = transformer::load(bundle.architecture(), source)?;
                bisect_plain(&rebuilt, &loader, reference.as_ref(), ids)?
            }
            Asked::Homer(plan, prompt, bias) => {
                let reference = Llama::load(bundle.llama()?, source)?;
                let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
                let bar = output.bar("Searching nodes", plan.nodes.len() as u64);
                let mut on_node = |done| bar.set_position(done as u64);
                let in_tree = bisect_homer(&rebuilt, &loader, &reference, (plan, prompt), &bias, &mut on_node)?;
                bar.finish_and_clear();
                if in_tree.is_some() {
                    in_tree
                } else {
                    let ids = &prompt.context[..prompt.context.len().min(DECODER_ROWS)];
                    bisect_plain(&rebuilt, &loader, &reference, ids)?
                }
            }
        };
        if let (Some(found), Some(folder)) = (&found, &self.reproducer) {
            reproducer::write(&rebuilt, found, folder, false)?;
            output.remark(format!("{} shows the difference; its README.md says how", folder.display()));
        }
        let culprit = found.as_ref().map(|found| &found.culprit);
        let report = Report { schema: "accordion.bisect/1", culprit };
        output.result(&report, || match culprit {
            Some(culprit) => reproducer::summary(culprit),
            None => "every output of every graph is within its bounds\n".to_owned(),
        })?;
        Ok(if culprit.is_some() { Outcome::CheckFailed } else { Outcome::Done })
    }
}
