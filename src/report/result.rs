//! The results that have no schema elsewhere, and reading any result from its JSON.

use super::Report;
use super::plan::{PLAN, PlanSummary};
use crate::eval::summary::summarise_rows;
use crate::pipeline::sampling::SamplingSettings;
use accordion_graphs::plan::PromptLengths;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

const GENERATION: &str = "accordion.generation/1";
/// What `accordion run --json` prints.
const RUN: &str = "accordion.run/1";
/// What `accordion inspect --json` prints.
const INSPECT: &str = "accordion.inspect/1";

/// One generated text and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// `accordion.generation/1`.
    pub schema: String,
    /// The method that compressed the context.
    pub method: String,
    /// Tokens of the context.
    pub context_tokens: usize,
    /// Tokens that were left of the prompt.
    pub tokens_kept: usize,
    /// The question after the context.
    pub prompt: String,
    /// What the model wrote.
    pub text: String,
    /// Tokens of the text.
    pub tokens: usize,
    /// Settings of the method and of sampling: names and values.
    pub settings: Vec<(String, String)>,
    /// Seed of the sampling; absent when greedy.
    pub seed: Option<u64>,
    /// What a reader has to know in order to judge the text fairly.
    pub remark: Option<String>,
}

impl GenerationRecord {
    /// The value of [`Self::schema`].
    pub const SCHEMA: &str = GENERATION;
}

/// Why a file is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultError {
    /// Not JSON, or a field is missing or of the wrong type.
    #[error("{name}: {source}")]
    Malformed {
        /// What was read.
        name: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An inspection of something that compresses no prompt.
    #[error("{name}: it has no plan of a method; inspect a bundle of one with --context N")]
    NoPlan {
        /// What was read.
        name: String,
    },
    /// Another program's JSON, or another version's.
    #[error("{name}: schema is {found:?}, expected one of {}", SCHEMAS.join(", "))]
    Schema {
        /// What was read.
        name: String,
        /// What it says it is.
        found: String,
    },
}

/// What `accordion inspect --json` prints, as far as the page shows it.
#[derive(Deserialize)]
struct Inspection {
    plan: Option<InspectedPlan>,
}

#[derive(Deserialize)]
struct InspectedPlan {
    tree: Option<PlanSummary>,
}

const SCHEMAS: [&str; 9] = [
    crate::verify::schema::SCHEMA,
    crate::profile::schema::SCHEMA,
    crate::eval::quality::report::SCHEMA,
    crate::eval::schema::SCHEMA,
    crate::eval::kept::SCHEMA,
    PLAN,
    GENERATION,
    RUN,
    INSPECT,
];

impl Report {
    /// Adds one result, whichever it is. `name` (a file name) is for the error.
    ///
    /// # Errors
    ///
    /// `json` is malformed, or its `schema` is none that this version reads.
    pub fn add_result(&mut self, name: &str, json: &[u8]) -> Result<(), ResultError> {
        let malformed = |source| ResultError::Malformed { name: name.to_owned(), source };
        // `accordion run --json` prints one value per question, `accordion eval --out` one per sample.
        let values: Vec<Value> =
            serde_json::Deserializer::from_slice(json).into_iter().collect::<Result<_, _>>().map_err(malformed)?;
        if values.is_empty() {
            return Err(malformed(serde::de::Error::custom("the file is empty")));
        }
        let mut rows = Vec::new();
        for value in values {
            let Head { schema, cells } = Head::deserialize(&value).map_err(malformed)?;
            match schema.as_str() {
                crate::verify::schema::SCHEMA => {
                    self.verifications.push(serde_json::from_value(value).map_err(malformed)?);
                }
                crate::profile::schema::SCHEMA => self.profiles.push(serde_json::from_value(value).map_err(malformed)?),
                crate::eval::quality::report::SCHEMA => {
                    self.qualities.push(serde_json::from_value(value).map_err(malformed)?);
                }
                crate::eval::schema::SCHEMA if cells.is_some() => {
                    self.evaluations.push(serde_json::from_value(value).map_err(malformed)?);
                }
                crate::eval::schema::SCHEMA => rows.push(serde_json::from_value(value).map_err(malformed)?),
                crate::eval::kept::SCHEMA => self.kept.push(serde_json::from_value(value).map_err(malformed)?),
                PLAN => self.plans.push(serde_json::from_value(value).map_err(malformed)?),
                GENERATION => self.generations.push(serde_json::from_value(value).map_err(malformed)?),
                INSPECT => {
                    let tree =
                        serde_json::from_value::<Inspection>(value).map_err(malformed)?.plan.and_then(|plan| plan.tree);
                    self.plans.push(tree.ok_or_else(|| ResultError::NoPlan { name: name.to_owned() })?);
                }
                RUN => self.generations.push(serde_json::from_value::<Run>(value).map_err(malformed)?.into()),
                _ => return Err(ResultError::Schema { name: name.to_owned(), found: schema }),
            }
        }
        self.evaluations.extend(summarise_rows(rows));
        Ok(())
    }
}

#[derive(Deserialize)]
struct Head {
    schema: String,
    /// Summaries of evaluations have them, rows have not.
    cells: Option<IgnoredAny>,
}

/// What `accordion run --json` prints, as far as the page shows it.
#[derive(Deserialize)]
struct Run {
    method: String,
    lengths: PromptLengths,
    tokens_kept: usize,
    prompt: String,
    text: String,
    tokens: usize,
    sampling: SamplingSettings,
}

impl From<Run> for GenerationRecord {
    fn from(run: Run) -> Self {
        let greedy = run.sampling.temperature == 0.0;
        Self {
            schema: GENERATION.to_owned(),
            method: run.method,
            context_tokens: run.lengths.context,
            tokens_kept: run.tokens_kept,
            prompt: run.prompt,
            text: run.text,
            tokens: run.tokens,
            settings: vec![("temperature".to_owned(), run.sampling.temperature.to_string())],
            seed: (!greedy).then_some(run.sampling.seed),
            remark: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};

    #[test]
    fn results_are_told_apart_by_their_schema() {
        let settings =
            HomerSettings { max_chunk_len: 64, max_initial_chunk_len: None, target_len: 64, layers_warmup: 1 };
        let plan = HomerPlan::new(6, PromptLengths { prefix: 2, context: 200, suffix: 4 }, settings).unwrap();
        let summary = PlanSummary::from(&plan);
        let mut report = Report::default();
        report.add_result("plan.json", &serde_json::to_vec(&summary).unwrap()).unwrap();
        assert_eq!(report.plans, std::slice::from_ref(&summary));
        let inspected = |plan: &str| format!(r#"{{"schema": "accordion.inspect/1", "path": "b", "plan": {plan}}}"#);
        let tree = format!(r#"{{"state_tokens": 3, "tree": {}}}"#, serde_json::to_string(&summary).unwrap());
        report.add_result("inspect.json", inspected(&tree).as_bytes()).unwrap();
        assert_eq!(report.plans, [summary.clone(), summary]);
        for without in ["null", r#"{"state_tokens": 3}"#] {
            let refused = report.add_result("inspect.json", inspected(without).as_bytes()).unwrap_err();
            assert!(refused.to_string().contains("--context N"), "{refused}");
        }
    }

    #[test]
    fn every_answer_of_a_run_is_a_text_of_its_own() {
        let answer = |text: &str, temperature: f32| {
            format!(
                r#"{{"schema": "accordion.run/1", "method": "homer", "lengths": {{"prefix": 1, "context": 90, "suffix": 4}},
                "tokens_kept": 30, "prompt": "?", "text": "{text}", "tokens": 5, "stop": {{"type": "eos"}},
                "sampling": {{"temperature": {temperature}, "top_k": null, "top_p": 1.0, "seed": 7}}}}"#
            )
        };
        let mut report = Report::default();
        report.add_result("run.json", (answer("one", 0.0) + &answer("two", 0.5)).as_bytes()).unwrap();
        let found: Vec<_> = report.generations.iter().map(|g| (g.text.as_str(), g.context_tokens, g.seed)).collect();
        assert_eq!(found, [("one", 90, None), ("two", 90, Some(7))]);
    }

    #[test]
    fn rows_of_an_evaluation_are_summed_up_and_its_summary_is_taken_as_it_is() {
        let row = |sample: usize, hit: bool| {
            format!(
                r#"{{"schema":"accordion.eval/1","task":"passkey","method":"homer","length":4096,"depth":50,"sample":{sample},
                "seed":0,"model":"m","settings":{{}},"prompt":{{"prefix":1,"context":90,"suffix":4}},"tokens_kept":30,
                "outcome":{{"type":"answer","expected":["7"],"answer":"7","hit":{hit},"score":1.0}},
                "compression_seconds":1.0,"answer_seconds":1.0}}"#
            ) + "\n"
        };
        let mut report = Report::default();
        report.add_result("rows.jsonl", (row(0, true) + &row(1, false)).as_bytes()).unwrap();
        let [summary] = &report.evaluations[..] else { panic!("{:?}", report.evaluations) };
        assert_eq!(
            summary.cells.iter().map(|cell| (cell.depth, cell.n)).collect::<Vec<_>>(),
            [(Some(50), 2), (None, 2)]
        );
        let mut again = Report::default();
        again.add_result("eval.json", &serde_json::to_vec(summary).unwrap()).unwrap();
        assert_eq!(again.evaluations.len(), 1);
        assert_eq!(again.evaluations[0].cells.len(), summary.cells.len());
    }

    #[test]
    fn what_is_no_result_is_refused_by_name() {
        let mut report = Report::default();
        let refusal =
            |report: &mut Report, json: &str| report.add_result("a.json", json.as_bytes()).unwrap_err().to_string();
        let foreign = refusal(&mut report, r#"{"schema": "accordion.verify/9"}"#);
        assert!(
            foreign.starts_with(r#"a.json: schema is "accordion.verify/9", expected one of accordion.verify/1,"#),
            "{foreign}"
        );
        assert!(refusal(&mut report, "{}").contains("missing field `schema`"));
        assert!(refusal(&mut report, r#"{"schema": "accordion.plan/1"}"#).contains("missing field `method`"));
        assert!(refusal(&mut report, "[1e999]").starts_with("a.json: "));
        assert_eq!(report, Report::default());
    }
}
