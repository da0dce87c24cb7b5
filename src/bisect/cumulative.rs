//! Every part of every graph by itself: the nodes between a tap and the taps before it are given the reference's values, so
//! that what is wrong in one place spoils nothing behind it, and every place that is wrong shows.

use super::BisectError;
use super::case::{Visit, decides};
use super::steps::{Steps, points};
use super::terms::Terms;
use crate::runtime::Loader;
use crate::verify::verdict::{TapResult, Verdict};
use crate::verify::{Detail, Findings};
use std::ops::ControlFlow;

/// Judges every point of `cases` that `detail` includes, each computed from the reference's values of the points before it, by
/// `terms`. Results are called as their taps, behind the place of their case; linear layers of bundles that are not fp32 as
/// `linears.`, the graph and the matrix. `on_case` hears how many cases are done.
///
/// # Errors
///
/// A case cannot be made, or a part of a graph not be loaded or run.
pub fn compare(
    loader: &dyn Loader,
    terms: &Terms<'_>,
    detail: Detail,
    on_case: &mut dyn FnMut(usize),
    cases: impl FnOnce(&mut Visit<'_>) -> Result<ControlFlow<()>, BisectError>,
) -> Result<Findings, BisectError> {
    let mut steps = Steps::new(loader, terms);
    let (mut findings, mut done) = (Findings::default(), 0);
    let _ended = cases(&mut |case| {
        let points = points(case);
        for (at, point) in points.iter().enumerate() {
            let scope = if case.place.is_empty() { String::new() } else { format!("{}.", case.place) };
            let name = format!("{scope}{}", point.name);
            if !detail.includes(&name) {
                continue;
            }
            let Some(outcome) = steps.run(case, &points, point)? else { continue };
            findings.taps.extend(outcome.linears.into_iter().map(|linear| linear.result));
            let tie = outcome.result.verdict == Verdict::Ambiguous && decides(&point.name);
            findings.taps.push(TapResult { name, ..outcome.result });
            if tie {
                // One node computes a choice and what follows from it.
                findings.not_comparable += points.len() - at - 1;
                break;
            }
        }
        done += 1;
        on_case(done);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(findings)
}
