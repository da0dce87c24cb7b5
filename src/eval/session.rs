//! All samples of a task, put to all contenders.

use super::attempt::{Attempt, attempt};
use super::contender::Contender;
use super::rows::Rows;
use super::schema::{Row, RowKey, SCHEMA};
use super::task::{Case, Settings, Task};
use super::{EvalError, Sample};
use crate::checkpoint::Tokenizer;
use crate::pipeline::Engines;

/// Who takes part, on what.
#[derive(Debug, Clone)]
pub struct Session<'a> {
    /// The contenders; the first one of all sessions is what the others are compared with.
    pub contenders: &'a [Contender],
    /// Fingerprint of the model that rows are filed under.
    pub model: &'a str,
    /// Whether openings are read here: those of several sessions have to be read once, by one that can read plainly.
    pub openings: bool,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Of the engine: what might change a result and is no one's else.
    pub engine: Settings,
    /// Whether to tell where the answers' tokens were lost. Rows that do not tell are computed again.
    pub explain: bool,
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Rows there are, this one included.
    pub done: usize,
    /// Rows there will be.
    pub total: usize,
    /// The row.
    pub row: &'a Row,
    /// Whether an earlier run had computed it.
    pub known: bool,
}

impl Session<'_> {
    /// All rows of `task`, those that `rows` lacks computed and added to it. That everyone can read every prompt is checked
    /// before anything is computed.
    ///
    /// # Errors
    ///
    /// A case does not fit its text or a contender, a graph fails, or a row cannot be written. What was done is in `rows`.
    pub fn run(
        &self,
        task: &dyn Task,
        engines: &mut Engines<'_>,
        rows: &mut Rows,
        on_row: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Vec<Row>, EvalError> {
        let plain = Contender::plain(None);
        let mut open = Vec::new();
        for case in task.cases().into_iter().filter(|case| self.openings || !case.opening) {
            let everyone = if case.opening { std::slice::from_ref(&plain) } else { self.contenders };
            open.extend(everyone.iter().filter(|one| one.takes(case.length)).map(|contender| (case, contender)));
        }
        for (case, contender) in &open {
            check(engines, contender, *case, &task.sample(*case)?)?;
        }
        let total = open.len();
        let mut all = Vec::with_capacity(total);
        for (case, contender) in open {
            let key = self.key(task, contender, case);
            let sample = task.sample(case)?;
            let known =
                rows.get(&key).filter(|row| row.survival.is_some() || !self.explains(contender, &sample)).cloned();
            let (row, known) = if let Some(row) = known {
                (row, true)
            } else {
                let row = row(key, attempt(engines, self.tokenizer, contender, &sample, self.explain)?);
                rows.push(row.clone())?;
                (row, false)
            };
            on_row(Progress { done: all.len() + 1, total, row: &row, known });
            all.push(row);
        }
        Ok(all)
    }

    /// Whether `contender` could tell where the answer of `sample` was lost, and should.
    fn explains(&self, contender: &Contender, sample: &Sample) -> bool {
        self.explain && contender.compression().method() == "homer" && !sample.marked.is_empty()
    }

    fn key(&self, task: &dyn Task, contender: &Contender, case: Case) -> RowKey {
        let mut settings = self.engine.clone();
        settings.extend(task.settings());
        settings.extend(contender.settings());
        RowKey {
            task: task.name().to_owned(),
            method: contender.name().to_owned(),
            length: case.length,
            depth: case.depth,
            sample: case.sample,
            seed: task.seed(),
            model: self.model.to_owned(),
            settings,
        }
    }
}

/// Whether `contender` can read the sample.
fn check(engines: &Engines<'_>, contender: &Contender, case: Case, sample: &Sample) -> Result<(), EvalError> {
    let prompt = contender.prompt(sample)?;
    contender.compression().check(engines.bundle(), prompt.lengths()).map_err(|source| EvalError::Contender {
        contender: contender.name().to_owned(),
        length: case.length,
        source: Box::new(source),
    })
}

fn row(key: RowKey, done: Attempt) -> Row {
    let Attempt { prompt, tokens_kept, outcome, survival, compression_seconds, answer_seconds } = done;
    let schema = SCHEMA.to_owned();
    Row { schema, key, prompt, tokens_kept, outcome, survival, compression_seconds, answer_seconds }
}
