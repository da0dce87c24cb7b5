//! SharedLLM's rows: the plan against the lengths and positions of the authors' code, then everything that it computed and,
//! in rows of their own, everything that is known of the repaired variant.

use super::compare::{Bound, Comparison, Tensors, integers};
use super::table::Table;
use super::{Implementation, implementations};
use accordion::goldens::SharedLlmCase;
use accordion::tensor::Tensor;
use accordion::verify::golden::sharedllm::{is_planned, plan};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::sharedllm::Quirks;
use std::path::Path;

/// What a computation is held to.
struct Bounds {
    /// How far a float may be off.
    float: Bound,
    /// Similarities closer than this are a tie: in single precision, their noise is a tenth of it.
    similarity: f32,
    /// Logits closer than this are a tie: twice the noise that is seen in single precision.
    logit: Bound,
}

impl Bounds {
    /// In half precision, what HOMER's goldens are held to. Similarities are cosines: their largest magnitude is one.
    fn of(dtype: DType) -> Self {
        let float = Bound::steps(dtype, 20.0);
        match dtype {
            DType::F16 | DType::Bf16 => Self { float, similarity: float.relative, logit: float },
            _ => Self { float, similarity: 2e-6, logit: Bound { absolute: 2e-5, relative: 0.0 } },
        }
    }
}

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

fn one_case(table: &mut Table, case: &SharedLlmCase) {
    match check_plan(case) {
        Ok(result) => table.row("sharedllm", &case.name, "plan", &result),
        Err(difference) => return table.failure(&format!("sharedllm {}: plan: {difference}", case.name)),
    }
    for quirks in [Quirks::Faithful, Quirks::Fixed] {
        let row = match quirks {
            Quirks::Faithful => case.name.clone(),
            Quirks::Fixed => format!("{} fixed", case.name),
        };
        for mut implementation in implementations() {
            let name = implementation.name();
            match implementation.sharedllm(case, quirks) {
                Ok(found) => {
                    let comparison = compare(case, quirks, &found, implementation.as_ref());
                    table.comparison("sharedllm", &row, name, &comparison);
                }
                Err(error) => table.not_run("sharedllm", &row, name, &error),
            }
        }
    }
}

/// What lengths alone decide: which tokens of a node are kept, how many of a chunk, and in which order chunks follow.
fn check_plan(case: &SharedLlmCase) -> Result<String, String> {
    let plan = plan(case, Quirks::Faithful).map_err(|e| e.to_string())?;
    let rows = plan.injected_rows();
    let mut lengths = vec![
        ("pos.self_prefill".to_owned(), (0..plan.running).collect::<Vec<_>>()),
        ("pos.cross_key_nominal".to_owned(), (0..rows).map(|row| row / plan.kept_per_chunk).collect()),
    ];
    for (w, level) in plan.levels.iter().enumerate() {
        lengths.push((format!("tree.d{w}.selected"), (0..level.node_len).step_by(level.step).collect()));
    }
    for (name, planned) in &lengths {
        let expected = case.faithful.get(name).and_then(integers).ok_or_else(|| format!("no {name}"))?;
        if planned.iter().map(|&at| at as i64).ne(expected.iter().copied()) {
            return Err(format!("{name} is {planned:?}, expected {expected:?}"));
        }
    }
    Ok(format!("{} of {} tokens kept per chunk, as the authors keep them: PASS", plan.kept_per_chunk, case.chunk_len))
}

fn compare(case: &SharedLlmCase, quirks: Quirks, found: &Tensors, implementation: &dyn Implementation) -> Comparison {
    let expected = case.expected(quirks);
    let mut result = Comparison::new("");
    let bounds = Bounds::of(implementation.dtype());
    let choice = tied_choice(expected, found, quirks, bounds.similarity);
    let token = tied_token(expected, found, bounds.logit);
    for (name, expected) in
        expected.iter().filter(|(name, _)| !is_planned(name) && !implementation.omits_sharedllm(case, name))
    {
        let after_choice = choice.as_ref().is_some_and(|(level, _)| depends_on_choice(name, *level));
        if after_choice || token.as_ref().is_some_and(|(tied, _)| tied == name) {
            result.skip();
        } else {
            result.compare(name, expected, found, bounds.float);
        }
    }
    if quirks == Quirks::Fixed {
        steps_equal_one_call(case, found, bounds.float, &mut result);
    }
    let findings = choice.into_iter().map(|(_, finding)| finding).chain(token.into_iter().map(|(_, finding)| finding));
    for finding in findings {
        result.ambiguous(finding);
    }
    result
}

/// Without the released code's rotation of single tokens, decoding step by step is what one call over all tokens is. An
/// implementation may have fed other tokens at once, as the golden did for the released variant; then there is nothing to hold.
fn steps_equal_one_call(case: &SharedLlmCase, found: &Tensors, bound: Bound, result: &mut Comparison) {
    let same_tokens = [case.running_ids.as_slice(), &case.decode_ids(Quirks::Fixed)].concat();
    let fed = found.get("teacher_forced.input_ids").and_then(integers);
    if fed != Some(same_tokens.into_iter().map(i64::from).collect()) {
        return;
    }
    let Some(at_once) = found.get("teacher_forced.logits") else { return };
    let vocab = case.architecture.vocab_size;
    for (step, row) in at_once.to_f32().chunks_exact(vocab).skip(case.running_ids.len()).enumerate() {
        let row = Tensor::from_f32([1, 1, vocab], row.to_vec()).unwrap();
        result.compare(&format!("decode.{step}.logits"), &row, found, bound);
    }
}

/// The first level at which other halves were chosen than expected, all of them within a tie.
fn tied_choice(expected: &Tensors, found: &Tensors, quirks: Quirks, tie: f32) -> Option<(usize, String)> {
    let chosen = |tensors: &Tensors, level| integers(tensors.get(&format!("tree.d{level}.chosen"))?);
    for level in 0.. {
        let (chosen, found) = (chosen(expected, level)?, chosen(found, level)?);
        let similarity = expected.get(&format!("tree.d{level}.sim"))?.to_f32();
        let count = chosen.len();
        let gap = |chunk: usize| match quirks {
            Quirks::Faithful => (similarity[2 * chunk] - similarity[2 * chunk + 1]).abs(),
            Quirks::Fixed => (similarity[chunk] - similarity[count + chunk]).abs(),
        };
        let other: Vec<usize> = (0..count).filter(|&chunk| found.get(chunk) != chosen.get(chunk)).collect();
        if other.is_empty() {
            continue;
        }
        let widest = other.iter().map(|&chunk| gap(chunk)).fold(0.0, f32::max);
        let finding = format!("level {level} chose the other half of chunks {other:?}, at most {widest:.2e} apart");
        return (widest <= tie).then_some((level, finding));
    }
    None
}

/// Whether the golden tensor `name` follows from what was chosen at `level`.
fn depends_on_choice(name: &str, level: usize) -> bool {
    let at = |prefix: &str| {
        let (digits, part) = name.strip_prefix(prefix)?.split_once('.')?;
        Some((digits.parse::<usize>().ok()?, part.to_owned()))
    };
    if let Some((w, part)) = at("tree.d") {
        let of_this_choice = part == "chosen" || part.starts_with("encoded_");
        return part != "query_vector" && (w > level || (w == level && of_this_choice));
    }
    if let Some((w, _)) = at("enc.d") {
        return w >= level;
    }
    !name.starts_with("pos.") && name != "prefill.hidden.0" && !name.ends_with(".position_id")
}

/// The first token that was decided otherwise than expected, with a logit within a tie.
fn tied_token(expected: &Tensors, found: &Tensors, tie: Bound) -> Option<(String, String)> {
    let id = |tensors: &Tensors, name: &str| integers(tensors.get(name)?)?.first().copied();
    for step in 0.. {
        let name = format!("decode.{step}.input_id");
        let (expected_id, found_id) = (id(expected, &name)?, id(found, &name)?);
        if expected_id == found_id {
            continue;
        }
        let decided_by = if step == 0 { "prefill.logits".to_owned() } else { format!("decode.{}.logits", step - 1) };
        let logits = expected.get(&decided_by)?;
        let row = logits.len() - logits.shape().last()?;
        let values = logits.to_f32();
        let logit = |id: i64| values.get(row + usize::try_from(id).ok()?).copied();
        let gap = logit(expected_id)? - logit(found_id)?;
        let finding = format!("{name}: {found_id} instead of {expected_id}, {gap:.2e} apart");
        return (gap.abs() <= tie.of(&values)).then_some((name, finding));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::compare::Verdict;
    use super::super::reference::Reference;
    use super::*;
    use accordion::tensor::Tensor;

    /// The verdict on what the golden says, damaged, of case q4; `found` also holds what goes for golden.
    fn verdict_after(damage: impl FnOnce(&mut SharedLlmCase, &mut Tensors)) -> Verdict {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm");
        let mut case = SharedLlmCase::open(&folder.join("case_q4.json")).unwrap();
        let mut found = case.faithful.clone();
        damage(&mut case, &mut found);
        compare(&case, Quirks::Faithful, &found, &Reference).verdict()
    }

    fn choose_otherwise(found: &mut Tensors) {
        let mut chosen = integers(&found["tree.d1.chosen"]).unwrap();
        chosen[2] = 1 - chosen[2];
        found.insert("tree.d1.chosen".into(), Tensor::from_i64([4], chosen).unwrap());
        found.remove("prefill.logits");
    }

    fn change(tensors: &mut Tensors, name: &str, change: impl FnOnce(&mut Vec<f32>)) {
        let mut values = tensors[name].to_f32();
        change(&mut values);
        tensors.insert(name.into(), Tensor::from_f32(tensors[name].shape(), values).unwrap());
    }

    #[test]
    fn another_choice_is_excused_only_within_a_tie() {
        assert_eq!(verdict_after(|_, _| {}), Verdict::Pass);
        assert_eq!(verdict_after(|_, found| choose_otherwise(found)), Verdict::Fail);
        let tie = |case: &mut SharedLlmCase, found: &mut Tensors| {
            for tensors in [&mut case.faithful, found] {
                change(tensors, "tree.d1.sim", |similarity| similarity[5] = similarity[4] + 1e-6);
            }
        };
        let tied = verdict_after(|case, found| {
            tie(case, found);
            choose_otherwise(found);
        });
        assert_eq!(tied, Verdict::Ambiguous);
        for held in ["tree.d0.encoded_ids", "tree.d1.cand_ids", "tree.d1.enc_vectors", "enc.d0.layer1.key"] {
            let damaged = verdict_after(|case, found| {
                tie(case, found);
                choose_otherwise(found);
                found.remove(held);
            });
            assert_eq!(damaged, Verdict::Fail, "{held}");
        }
    }

    #[test]
    fn another_token_is_excused_only_within_a_tie() {
        let other = |found: &mut Tensors| {
            found.insert("decode.2.input_id".into(), Tensor::from_i64([1, 1], vec![7]).unwrap());
        };
        assert_eq!(verdict_after(|_, found| other(found)), Verdict::Fail);
        let tied = verdict_after(|case, found| {
            for tensors in [&mut case.faithful, &mut *found] {
                change(tensors, "decode.1.logits", |logits| logits[7] = logits[14] - 1e-5);
            }
            other(found);
        });
        assert_eq!(tied, Verdict::Ambiguous);
    }
}
