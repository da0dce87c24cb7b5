//! What the rows of an evaluation say together.

use super::contender::Contender;
use super::perplexity::OPENING;
use super::schema::{
    BucketPerplexity, Cell, CellResult, Comparison, LevelSurvival, MethodSettings, Outcome, Row, Running, SCHEMA,
    Summary,
};
use super::session::Session;
use super::stats::{mean, wilson};
use super::task::Task;
use std::collections::{BTreeMap, BTreeSet};

/// Summarises the `rows` of `task` in `session` on the model called `model`.
pub fn summarise(task: &dyn Task, session: &Session<'_>, model: &str, rows: &[Row]) -> Summary {
    let mut settings = session.engine.clone();
    settings.extend(task.settings());
    let openings: Vec<&Row> = rows.iter().filter(|row| is_opening(row)).collect();
    let rows: Vec<&Row> = rows.iter().filter(|row| !is_opening(row)).collect();
    let methods: Vec<&str> = session.contenders.iter().map(Contender::name).collect();
    let mut cells = Vec::new();
    for method in &methods {
        let of_method: Vec<&Row> = rows.iter().copied().filter(|row| row.key.method == *method).collect();
        let lengths: BTreeSet<usize> = of_method.iter().map(|row| row.key.length).collect();
        for length in lengths {
            let of_length: Vec<&Row> = of_method.iter().copied().filter(|row| row.key.length == length).collect();
            let depths: BTreeSet<u8> = of_length.iter().filter_map(|row| row.key.depth).collect();
            for depth in depths {
                let of_depth: Vec<&Row> =
                    of_length.iter().copied().filter(|row| row.key.depth == Some(depth)).collect();
                cells.extend(cell(method, length, Some(depth), &of_depth));
            }
            cells.extend(cell(method, length, None, &of_length));
        }
    }
    let of = |one: &Contender| MethodSettings { method: one.name().to_owned(), settings: one.settings() };
    Summary {
        schema: SCHEMA.to_owned(),
        task: task.name().to_owned(),
        model: model.to_owned(),
        seed: task.seed(),
        settings,
        methods: session.contenders.iter().map(of).collect(),
        cells,
        comparisons: comparisons(&methods, &rows),
        running: running(&methods, &openings, &rows),
    }
}

fn is_opening(row: &Row) -> bool {
    matches!(row.outcome, Outcome::Likelihood { .. }) && row.key.length == OPENING
}

fn cell(method: &str, length: usize, depth: Option<u8>, rows: &[&Row]) -> Option<Cell> {
    Some(Cell {
        method: method.to_owned(),
        length,
        depth,
        n: rows.len(),
        result: result(rows)?,
        survival: levels(rows),
        compression_seconds: mean(&rows.iter().map(|row| row.compression_seconds).collect::<Vec<_>>())?.mean,
    })
}

/// All rows of a cell have outcomes of the same kind.
fn result(rows: &[&Row]) -> Option<CellResult> {
    let n = rows.len();
    let values: Vec<f64> = rows.iter().map(|row| value(&row.outcome).1).collect();
    let mean = mean(&values)?;
    let count = |hit: fn(&Outcome) -> bool| rows.iter().filter(|row| hit(&row.outcome)).count();
    match rows.first()?.outcome {
        Outcome::Answer { .. } => {
            let hits = count(|outcome| matches!(outcome, Outcome::Answer { hit: true, .. }));
            let (share, interval) = (hits as f64 / n as f64, wilson(hits, n)?);
            Some(CellResult::Answer { hits, share, interval, score: mean.mean })
        }
        Outcome::Continuation { .. } => {
            let exact = count(|outcome| matches!(outcome, Outcome::Continuation { exact: true, .. }));
            let (share, interval) = (exact as f64 / n as f64, wilson(exact, n)?);
            Some(CellResult::Continuation { exact, share, interval, bleu: mean })
        }
        Outcome::Likelihood { .. } => {
            let mut by_start: BTreeMap<usize, (usize, f64)> = BTreeMap::new();
            for row in rows {
                let Outcome::Likelihood { buckets, .. } = &row.outcome else { continue };
                for bucket in buckets {
                    let sum = by_start.entry(bucket.start).or_default();
                    *sum = (sum.0 + bucket.tokens, sum.1 + bucket.nll);
                }
            }
            let buckets = by_start.into_iter().map(|(start, (tokens, nll))| BucketPerplexity {
                start,
                tokens,
                perplexity: (nll / tokens as f64).exp(),
            });
            let buckets: Vec<BucketPerplexity> = buckets.collect();
            let tokens = buckets.iter().map(|bucket| bucket.tokens).sum();
            Some(CellResult::Likelihood { tokens, nll: mean, perplexity: mean.mean.exp(), buckets })
        }
    }
}

/// The number that a sample comes down to, and what it is.
fn value(outcome: &Outcome) -> (&'static str, f64) {
    match outcome {
        Outcome::Answer { score, .. } => ("score", *score),
        Outcome::Likelihood { tokens, nll, .. } => ("nll", nll / (*tokens).max(1) as f64),
        Outcome::Continuation { bleu, .. } => ("bleu", *bleu),
    }
}

fn levels(rows: &[&Row]) -> Vec<LevelSurvival> {
    let mut levels: BTreeMap<usize, LevelSurvival> = BTreeMap::new();
    for node in rows.iter().filter_map(|row| row.survival.as_ref()).flat_map(|survival| &survival.nodes) {
        let level = levels.entry(node.height).or_insert(LevelSurvival { height: node.height, entered: 0, left: 0 });
        level.entered += node.entered;
        level.left += node.left;
    }
    levels.into_values().collect()
}

/// Everyone against the first, at every length, sample by sample.
fn comparisons(methods: &[&str], rows: &[&Row]) -> Vec<Comparison> {
    let Some((baseline, others)) = methods.split_first() else { return Vec::new() };
    let lengths: BTreeSet<usize> = rows.iter().map(|row| row.key.length).collect();
    let mut comparisons = Vec::new();
    for (method, &length) in others.iter().flat_map(|method| lengths.iter().map(move |length| (method, length))) {
        let at = |name: &str| -> BTreeMap<(Option<u8>, usize), (&'static str, f64)> {
            let rows = rows.iter().filter(|row| row.key.method == name && row.key.length == length);
            rows.map(|row| ((row.key.depth, row.key.sample), value(&row.outcome))).collect()
        };
        let (theirs, ours) = (at(baseline), at(method));
        let pairs = ours.iter().filter_map(|(sample, (quantity, x))| Some((quantity, x - theirs.get(sample)?.1)));
        let (quantities, differences): (Vec<&&str>, Vec<f64>) = pairs.unzip();
        if let (Some(quantity), Some(difference)) = (quantities.first(), mean(&differences)) {
            let (method, baseline) = ((*method).to_owned(), (*baseline).to_owned());
            comparisons.push(Comparison { method, baseline, length, quantity: (**quantity).to_owned(), difference });
        }
    }
    comparisons
}

/// Perplexity of all tokens so far, after each segment: the opening's, then those of a contender's rows in order.
fn running(methods: &[&str], openings: &[&Row], rows: &[&Row]) -> Vec<Running> {
    let sums = |row: &Row| match row.outcome {
        Outcome::Likelihood { tokens, nll, .. } => (tokens, nll),
        _ => (0, 0.0),
    };
    let mut running = Vec::new();
    if openings.is_empty() {
        return running;
    }
    for method in methods {
        let mut by_length: BTreeMap<usize, Vec<&Row>> = BTreeMap::from([(OPENING, openings.to_vec())]);
        for row in rows.iter().filter(|row| row.key.method == *method) {
            by_length.entry(row.key.length).or_default().push(row);
        }
        let mut total = (0, 0.0);
        for (length, rows) in by_length {
            let mut segment = 0;
            for row in &rows {
                let (tokens, nll) = sums(row);
                total = (total.0 + tokens, total.1 + nll);
                segment = tokens;
            }
            let perplexity = (total.1 / total.0.max(1) as f64).exp();
            running.push(Running { method: (*method).to_owned(), tokens: length + segment, n: rows.len(), perplexity });
        }
    }
    running
}
