//! What the rows of an evaluation say together.

use super::perplexity::OPENING;
use super::schema::{
    BucketPerplexity, Cell, CellResult, Comparison, LevelSurvival, MethodSettings, Outcome, Row, RowKey, Running,
    SCHEMA, Summary,
};
use super::session::Session;
use super::stats::{mean, wilson};
use super::task::{Settings, Task};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// Summarises the `rows` of `task` in `sessions`, of which the first one has the settings that hold where a method has none
/// of its own.
pub fn summarise(task: &dyn Task, sessions: &[Session<'_>], rows: &[Row]) -> Summary {
    let mut settings = sessions.first().map(|session| session.engine.clone()).unwrap_or_default();
    let methods = sessions.iter().flat_map(|session| {
        let mut own = session.engine.clone();
        own.retain(|name, value| settings.get(name) != Some(value));
        session.contenders.iter().map(move |one| {
            let settings = own.clone().into_iter().chain(one.settings()).collect();
            MethodSettings { method: one.name().to_owned(), settings }
        })
    });
    let methods = methods.collect();
    settings.extend(task.settings());
    let model = sessions.first().map_or("", |session| session.model);
    filled(task.name(), model, task.seed(), settings, methods, rows)
}

/// Summarises rows of a file that may come from several evaluations: one summary for each task, model and seed. Settings
/// in which the rows of one evaluation differ decide who is a contender: where a method took part with several, its name
/// says which. Of several rows with the same key the last one counts.
pub fn summarise_rows(rows: Vec<Row>) -> Vec<Summary> {
    let mut last: BTreeMap<RowKey, usize> = BTreeMap::new();
    let mut distinct: Vec<Row> = Vec::new();
    for row in rows {
        match last.entry(row.key.clone()) {
            Entry::Occupied(place) => distinct[*place.get()] = row,
            Entry::Vacant(place) => {
                place.insert(distinct.len());
                distinct.push(row);
            }
        }
    }
    let mut evaluations: Vec<Vec<Row>> = Vec::new();
    let same = |a: &RowKey, b: &RowKey| (&a.task, &a.model, a.seed) == (&b.task, &b.model, b.seed);
    for row in distinct {
        match evaluations.iter_mut().find(|others| others.iter().take(1).all(|other| same(&other.key, &row.key))) {
            Some(others) => others.push(row),
            None => evaluations.push(vec![row]),
        }
    }
    evaluations.into_iter().filter_map(evaluation).collect()
}

/// Summarises rows of one task, model and seed; `None` without rows.
fn evaluation(mut rows: Vec<Row>) -> Option<Summary> {
    let RowKey { task, model, seed, settings, .. } = rows.first()?.key.clone();
    let mut shared = settings;
    shared.retain(|name, value| rows.iter().all(|row| row.key.settings.get(name) == Some(value)));
    let mut methods: Vec<MethodSettings> = Vec::new();
    for row in &rows {
        let mut settings = row.key.settings.clone();
        settings.retain(|name, _| !shared.contains_key(name));
        let method = MethodSettings { method: row.key.method.clone(), settings };
        if !methods.contains(&method) {
            methods.push(method);
        }
    }
    let called: Vec<String> = methods.iter().map(|one| name_among(one, &methods)).collect();
    for row in &mut rows {
        let own = |one: &MethodSettings| {
            one.method == row.key.method
                && row.key.settings.iter().filter(|(name, _)| !shared.contains_key(*name)).eq(&one.settings)
        };
        if let Some(place) = methods.iter().position(own) {
            row.key.method.clone_from(&called[place]);
        }
    }
    let methods = methods.into_iter().zip(called).map(|(one, method)| MethodSettings { method, ..one }).collect();
    Some(filled(&task, &model, seed, shared, methods, &rows))
}

/// The method of `one`; where others of `all` have the same, with the settings in which it differs from them.
fn name_among(one: &MethodSettings, all: &[MethodSettings]) -> String {
    let namesakes: Vec<&MethodSettings> = all.iter().filter(|other| other.method == one.method).collect();
    let differs =
        |(name, value): &(&String, &String)| namesakes.iter().any(|other| other.settings.get(*name) != Some(value));
    let told: Vec<String> =
        one.settings.iter().filter(differs).map(|(name, value)| format!("{name} {value}")).collect();
    match (namesakes.len(), told.is_empty()) {
        (1, _) => one.method.clone(),
        (_, true) => format!("{} (default)", one.method),
        _ => format!("{} ({})", one.method, told.join(", ")),
    }
}

fn filled(
    task: &str,
    model: &str,
    seed: u64,
    settings: Settings,
    contenders: Vec<MethodSettings>,
    rows: &[Row],
) -> Summary {
    let openings: Vec<&Row> = rows.iter().filter(|row| is_opening(row)).collect();
    let rows: Vec<&Row> = rows.iter().filter(|row| !is_opening(row)).collect();
    let methods: Vec<&str> = contenders.iter().map(|one| one.method.as_str()).collect();
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
    Summary {
        schema: SCHEMA.to_owned(),
        task: task.to_owned(),
        model: model.to_owned(),
        seed,
        settings,
        cells,
        comparisons: comparisons(&methods, &rows),
        running: running(&methods, &openings, &rows),
        methods: contenders,
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use accordion_graphs::plan::PromptLengths;

    fn row(method: &str, sample: usize, hit: bool, target: Option<&str>) -> Row {
        let mut settings = Settings::from([("new_tokens".into(), "20".into())]);
        settings.extend(target.map(|target| ("target_len".into(), target.into())));
        let (task, method, model) = ("passkey".into(), method.into(), "abc".into());
        Row {
            schema: SCHEMA.into(),
            key: RowKey { task, method, length: 4096, depth: Some(50), sample, seed: 3, model, settings },
            prompt: PromptLengths { prefix: 1, context: 2, suffix: 3 },
            tokens_kept: 6,
            outcome: Outcome::Answer {
                expected: Vec::new(),
                answer: String::new(),
                hit,
                score: f64::from(u8::from(hit)),
            },
            survival: None,
            compression_seconds: 0.25,
            answer_seconds: 0.5,
        }
    }

    fn told(summary: &Summary) -> Vec<(&str, usize, usize)> {
        let whole = summary.cells.iter().filter(|cell| cell.depth.is_none());
        let hits = |cell: &Cell| match cell.result {
            CellResult::Answer { hits, .. } => hits,
            _ => usize::MAX,
        };
        whole.map(|cell| (cell.method.as_str(), cell.n, hits(cell))).collect()
    }

    #[test]
    fn rows_alone_make_the_summary() {
        let rows = vec![
            row("homer", 0, false, Some("2048")),
            row("plain", 0, true, None),
            row("homer", 1, true, Some("2048")),
            row("homer", 0, true, Some("2048")),
        ];
        let [summary] = &summarise_rows(rows)[..] else { panic!("one evaluation") };
        assert_eq!(told(summary), [("homer", 2, 2), ("plain", 1, 1)]);
        assert_eq!((summary.seed, summary.task.as_str(), summary.cells[0].depth), (3, "passkey", Some(50)));
        assert_eq!(summary.settings, Settings::from([("new_tokens".into(), "20".into())]));
        assert_eq!(summary.methods[0].settings["target_len"], "2048");
        assert_eq!((&*summary.comparisons[0].method, summary.comparisons[0].difference.n), ("plain", 1));
    }

    #[test]
    fn one_method_with_several_settings_is_several_contenders() {
        let mut other_seed = row("homer", 0, true, Some("2048"));
        other_seed.key.seed = 4;
        let rows = vec![
            row("homer", 0, true, Some("2048")),
            row("homer", 0, false, Some("1024")),
            row("plain", 0, true, None),
            other_seed,
        ];
        let [summary, other] = &summarise_rows(rows)[..] else { panic!("two evaluations") };
        let expected = [("homer (target_len 2048)", 1, 1), ("homer (target_len 1024)", 1, 0), ("plain", 1, 1)];
        assert_eq!(told(summary), expected);
        assert_eq!((told(other), other.seed), (vec![("homer", 1, 1)], 4));
        assert!(summarise_rows(Vec::new()).is_empty());
    }
}
