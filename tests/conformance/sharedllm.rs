//! SharedLLM's rows: both variants, against what the authors' code computed and against the repaired computation.

use super::compare::{Bound, Comparison, SINGLE, Tensors, integers};
use super::table::Table;
use super::{Implementation, implementations};
use accordion::goldens::SharedLlmCase;
use accordion::tensor::Tensor;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks, SharedLlmPlan};
use std::path::Path;

/// Similarities closer than this are a tie: twice the noise that is seen.
const TIE: f32 = 2e-6;
/// Logits closer than this are a tie.
const LOGIT_TIE: Bound = Bound { absolute: 2e-5, relative: 0.0 };

/// Every case of `folder`.
pub(crate) fn cases(table: &mut Table, folder: &Path) {
    let cases = SharedLlmCase::find(folder).unwrap_or_default();
    if cases.is_empty() {
        table.failure(&format!("no case in {}", folder.display()));
    }
    for path in cases {
        match SharedLlmCase::open(&path) {
            Ok(case) => one_case(table, &case),
            Err(error) => table.failure(&format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

/// The plan of a case.
pub(crate) fn plan(case: &SharedLlmCase, quirks: Quirks) -> anyhow::Result<SharedLlmPlan> {
    let lengths = PromptLengths { prefix: 0, context: case.context_ids.len(), suffix: case.running_ids.len() };
    Ok(SharedLlmPlan::new(lengths, case.settings(quirks), ChunkPolicy::Chunks(case.chunks()))?)
}

fn one_case(table: &mut Table, case: &SharedLlmCase) {
    match kept(case) {
        Ok(result) => table.row("sharedllm", &case.name, "plan", &result),
        Err(difference) => return table.failure(&format!("sharedllm {}: plan: {difference}", case.name)),
    }
    for quirks in [Quirks::Faithful, Quirks::Fixed] {
        for mut implementation in implementations() {
            let name = match quirks {
                Quirks::Faithful => implementation.name().to_owned(),
                Quirks::Fixed => format!("{}, fixed", implementation.name()),
            };
            match implementation.sharedllm(case, quirks) {
                Ok(found) => {
                    let comparison = compare(case, quirks, &found, implementation.as_ref());
                    table.comparison("sharedllm", &case.name, &name, &comparison);
                }
                Err(error) => table.not_run("sharedllm", &case.name, &name, &error),
            }
        }
    }
}

/// What lengths alone decide: which tokens of every node are kept.
fn kept(case: &SharedLlmCase) -> Result<String, String> {
    let plan = plan(case, Quirks::Faithful).map_err(|error| error.to_string())?;
    for (w, level) in plan.levels.iter().enumerate() {
        let name = format!("tree.d{w}.selected");
        let expected = case.faithful.get(&name).and_then(integers).ok_or(format!("the golden has no {name}"))?;
        let planned: Vec<i64> = (0..level.node_len).step_by(level.step).map(|row| row as i64).collect();
        if planned != expected || planned.len() != level.kept {
            return Err(format!("{name}: {planned:?}, expected {expected:?}"));
        }
    }
    Ok(format!("{} levels, {} tokens kept of a chunk: PASS", plan.levels.len(), plan.kept_per_chunk))
}

fn compare(case: &SharedLlmCase, quirks: Quirks, found: &Tensors, implementation: &dyn Implementation) -> Comparison {
    let mut result = Comparison::new("");
    let all = case.expected(quirks);
    let (choice, token) = (tied_choice(all, found), tied_token(case, quirks, found));
    for (name, expected) in
        all.iter().filter(|(name, _)| !name.ends_with(".selected") && !implementation.omits_sharedllm(case, name))
    {
        let level = choice.as_ref().map(|(level, _)| *level);
        if level.is_some_and(|level| follows_from_choice(name, level)) || (token.is_some() && name == "generate.tokens")
        {
            result.skip();
        } else {
            result.compare(name, expected, found, SINGLE);
        }
    }
    if quirks == Quirks::Fixed {
        steps_equal_one_call(case, found, &mut result);
    }
    choice.map(|(_, finding)| finding).into_iter().chain(token).for_each(|finding| result.ambiguous(finding));
    result
}

/// Without the released code's rotation of single tokens, decoding step by step is what one call over all tokens is.
fn steps_equal_one_call(case: &SharedLlmCase, found: &Tensors, result: &mut Comparison) {
    let Some(at_once) = found.get("teacher_forced.logits") else { return };
    let vocab = case.architecture.vocab_size;
    let rows = at_once.to_f32();
    for (step, row) in rows.chunks_exact(vocab).skip(case.running_ids.len()).enumerate() {
        let row = Tensor::from_f32([1, 1, vocab], row.to_vec()).unwrap();
        result.compare(&format!("decode.{step}.logits"), &row, found, SINGLE);
    }
}

/// The first level where other halves were chosen than expected, all of them within a tie.
fn tied_choice(expected: &Tensors, found: &Tensors) -> Option<(usize, String)> {
    for level in 0.. {
        let name = format!("tree.d{level}.chosen");
        let chosen = [integers(expected.get(&name)?)?, integers(found.get(&name)?)?];
        let gap = |similarity: &[f32], chunk: usize, fixed: bool| {
            let chunks = similarity.len() / 2;
            let pair = if fixed { [chunk, chunks + chunk] } else { [2 * chunk, 2 * chunk + 1] };
            (similarity[pair[0]] - similarity[pair[1]]).abs()
        };
        let similarity = expected.get(&format!("tree.d{level}.sim"))?.to_f32();
        let fixed = !expected.contains_key("tree.d0.enc_vectors");
        let other: Vec<usize> = (0..chosen[0].len()).filter(|&i| chosen[0].get(i) != chosen[1].get(i)).collect();
        if !other.is_empty() {
            let widest = other.iter().map(|&chunk| gap(&similarity, chunk, fixed)).fold(0.0, f32::max);
            let finding =
                format!("{name}: other halves of chunks {other:?}, whose similarities are {widest:.2e} apart");
            return (widest <= TIE).then_some((level, finding));
        }
    }
    None
}

/// Whether `name` is computed from the halves chosen at `level`.
fn follows_from_choice(name: &str, level: usize) -> bool {
    let Some(rest) = name.strip_prefix("tree.d").or_else(|| name.strip_prefix("enc.d")) else { return true };
    let Some((number, part)) = rest.split_once('.') else { return true };
    let own = number.parse::<usize>().unwrap_or(0);
    own > level || (own == level && (part == "chosen" || part.starts_with("encoded") || name.starts_with("enc.")))
}

/// Says so if another token was generated than expected, with a logit within a tie.
fn tied_token(case: &SharedLlmCase, quirks: Quirks, found: &Tensors) -> Option<String> {
    let all = case.expected(quirks);
    let (expected, found) = (integers(all.get("generate.tokens")?)?, integers(found.get("generate.tokens")?)?);
    let at = expected.iter().zip(&found).position(|(e, f)| e != f)?;
    let step = at.checked_sub(case.running_ids.len())?;
    let logits = match step.checked_sub(1) {
        None => all.get("prefill.logits")?,
        Some(fed) => all.get(&format!("decode.{fed}.logits"))?,
    };
    let logits = logits.to_f32();
    let last = &logits[logits.len() - case.architecture.vocab_size..];
    let gap = last[usize::try_from(expected[at]).ok()?] - last[usize::try_from(found[at]).ok()?];
    (gap.abs() <= LOGIT_TIE.of(last))
        .then(|| format!("generate.tokens: {} instead of {} at {at}, {gap:.2e} apart", found[at], expected[at]))
}
