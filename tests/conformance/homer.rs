//! HOMER's rows: the plan against the nodes that the authors' code ran, then everything that it recorded.

use super::compare::{Bound, Comparison, Tensors, coarser, integers};
use super::implementations;
use super::table::Table;
use accordion::goldens::homer::{GoldenNode, HomerCase};
use accordion::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::homer::HomerPlan;
use std::collections::BTreeSet;
use std::path::Path;

/// Every case of `folder`.
pub(crate) fn cases(table: &mut Table, folder: &Path) {
    let cases = HomerCase::find(folder).unwrap_or_default();
    if cases.is_empty() {
        table.failure(&format!("no case in {}", folder.display()));
    }
    for path in cases {
        match HomerCase::open(&path) {
            Ok(case) => one_case(table, &case),
            Err(error) => table.failure(&format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

fn one_case(table: &mut Table, case: &HomerCase) {
    let plan = match plan(case) {
        Ok(plan) => plan,
        Err(difference) => return table.failure(&format!("homer {}: plan: {difference}", case.name)),
    };
    table.row("homer", &case.name, "plan", &format!("{} nodes as the authors ran them: PASS", plan.nodes.len()));
    for mut implementation in implementations() {
        let name = implementation.name();
        if !implementation.supports(case) {
            table.row("homer", &case.name, name, "not defined for this architecture");
            continue;
        }
        match implementation.homer(case, &plan) {
            Ok(found) => {
                let comparison = compare(case, &found, implementation.dtype(), &|tensor| implementation.omits(tensor));
                table.comparison("homer", &case.name, name, &comparison);
            }
            Err(error) => table.not_run("homer", &case.name, name, &error),
        }
    }
}

/// For `rope.inv_freq`: one rounding of the largest frequency, three digits of the smallest.
const FREQUENCIES: Bound = Bound { absolute: 1e-7, relative: 0.0 };

struct Bounds {
    /// How far a float may be off.
    float: Bound,
    /// Scores closer than this are a tie: noise can exchange them.
    tie: Bound,
}

impl Bounds {
    /// Single precision: the project's bound, and twice the noise that is seen. Narrower types: an `f32` computation
    /// from rounded weights differs from the golden by up to 6.6 of the type's rounding steps at the tensor's largest
    /// magnitude (case G); three times that is allowed, and scores are a tie within twice their own noise of 5.7 steps.
    fn of(dtype: DType) -> Self {
        let tie = match dtype {
            DType::F16 | DType::Bf16 => Bound::steps(dtype, 11.4),
            _ => Bound { absolute: 2e-5, relative: 0.0 },
        };
        Self { float: Bound::steps(dtype, 20.0), tie }
    }
}

/// The plan of the case, if it is what the authors' code ran.
fn plan(case: &HomerCase) -> Result<HomerPlan, String> {
    let plan =
        HomerPlan::new(case.architecture.num_layers, case.lengths(), case.settings).map_err(|e| e.to_string())?;
    let planned: Vec<GoldenNode> = plan
        .nodes
        .iter()
        .enumerate()
        .map(|(order, node)| GoldenNode {
            key: node.tap_scope(),
            height: node.height,
            index: node.index,
            order,
            layers: node.layers.clone().collect(),
            in_len: node.in_len,
            target_len: node.target_len,
            removed: node.removed(),
            out_len: node.out_len,
        })
        .collect();
    for (planned, expected) in planned.iter().zip(&case.nodes) {
        if planned != expected {
            return Err(format!("{planned:?}, expected {expected:?}"));
        }
    }
    if planned.len() == case.nodes.len() {
        Ok(plan)
    } else {
        Err(format!("{} nodes, expected {}", planned.len(), case.nodes.len()))
    }
}

/// Compares everything the case holds with what was found.
fn compare(case: &HomerCase, found: &Tensors, dtype: DType, omits: &dyn Fn(&str) -> bool) -> Comparison {
    let bounds = Bounds::of(coarser(case.dtype, dtype));
    let mut result = Comparison::new(match case.dtype {
        DType::F32 => "",
        _ => ", informative: half precision golden",
    });
    let mut ties = Vec::new();
    let after_ties = after_ties(case, found, &bounds, &mut ties);
    for tie in ties {
        result.ambiguous(tie);
    }
    for (name, expected) in case.expected.iter().filter(|(name, _)| !omits(name)) {
        if after_ties.contains(name) {
            result.skip();
            continue;
        }
        // The frequencies are inputs of everything else and span several orders of magnitude, in every precision.
        let bound = if name == "rope.inv_freq" { FREQUENCIES } else { bounds.float };
        result.compare(name, expected, found, bound);
    }
    result
}

/// The tensors that cannot be compared because an earlier choice fell the other way among equals.
fn after_ties(case: &HomerCase, found: &Tensors, bounds: &Bounds, ties: &mut Vec<String>) -> BTreeSet<String> {
    let mut affected = BTreeSet::new();
    for node in &case.nodes {
        if affected.contains(&format!("{}.in_hidden", node.key)) {
            continue;
        }
        if let Some(tie) = tied_selection(case, found, node, bounds) {
            ties.push(tie);
            affected.extend(case.expected.keys().filter(|name| depends_on_survivors(name, node)).cloned());
        }
    }
    if !affected.contains("generate.tokens")
        && let Some(tie) = tied_token(case, found, bounds)
    {
        ties.push(tie);
        affected.extend(case.expected.keys().filter(|name| name.starts_with("generate.")).cloned());
    }
    affected
}

/// Says so if `node` kept other rows than expected, all of them within a tie.
fn tied_selection(case: &HomerCase, found: &Tensors, node: &GoldenNode, bounds: &Bounds) -> Option<String> {
    let name = format!("{}.prune.keep_idx", node.key);
    let set = |tensor: &Tensor| integers(tensor).map(|rows| rows.into_iter().collect::<BTreeSet<_>>());
    let (expected, found) = (set(case.expected.get(&name)?)?, set(found.get(&name)?)?);
    let scores = case.expected.get(&format!("{}.prune.scores", node.key))?.to_f32();
    let exchanged: Vec<i64> = expected.symmetric_difference(&found).copied().collect();
    if exchanged.is_empty() || expected.len() != found.len() {
        return None;
    }
    let tie = bounds.tie.of(&scores);
    let scores: Vec<f32> = exchanged
        .iter()
        .map(|&row| usize::try_from(row).ok().and_then(|row| scores.get(row)).copied())
        .collect::<Option<_>>()?;
    let (low, high) = scores.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &s| (l.min(s), h.max(s)));
    (high - low <= tie)
        .then(|| format!("{name}: rows {exchanged:?} change places, their scores lie within {:.2e}", high - low))
}

/// Whether `name` is computed from the rows that `node` keeps.
fn depends_on_survivors(name: &str, node: &GoldenNode) -> bool {
    let own = |part: &str| name.starts_with(&format!("{}.{part}", node.key));
    if let Some(of_node) = name.strip_prefix("node.h") {
        let ancestor =
            of_node.split('.').next().and_then(|height| height.parse::<usize>().ok()).is_some_and(|height| {
                height > node.height
                    && name.starts_with(&format!("node.h{height}.i{}.", node.index >> (height - node.height)))
            });
        return ancestor || own("prune.keep_idx") || own("prune.remove_idx") || own("out_");
    }
    !name.starts_with("plain.") && !name.starts_with("rope.")
}

/// Says so if another token was generated than expected, with a logit within a tie.
fn tied_token(case: &HomerCase, found: &Tensors, bounds: &Bounds) -> Option<String> {
    let name = "generate.tokens";
    let (expected, found) = (integers(case.expected.get(name)?)?, integers(found.get(name)?)?);
    let step = expected.iter().zip(&found).position(|(e, f)| e != f)?;
    let (logits, row) = match step {
        0 => ("prefix.logits", case.expected.get("prefix.logits")?.shape()[0].checked_sub(1)?),
        _ => ("generate.step_logits", step - 1),
    };
    let vocab = case.architecture.vocab_size;
    let logits = case.expected.get(logits)?.to_f32();
    let logit = |token: i64| logits.get(row * vocab + usize::try_from(token).ok()?).copied();
    let gap = logit(expected[step])? - logit(found[step])?;
    (gap.abs() <= bounds.tie.of(&logits))
        .then(|| format!("{name}: {} instead of {} at step {step}, {gap:.2e} apart", found[step], expected[step]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Verdict;

    fn case(name: &str) -> HomerCase {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/homer");
        HomerCase::open(&folder.join(format!("homer_{name}.json"))).unwrap()
    }

    fn verdict_after(name: &str, damage: impl FnOnce(&mut Tensors)) -> Verdict {
        let case = case(name);
        let mut found = case.expected.clone();
        damage(&mut found);
        compare(&case, &found, DType::F32, &|_| false).verdict()
    }

    fn change(found: &mut Tensors, name: &str, change: impl FnOnce(&mut Vec<f32>)) {
        let mut values = found[name].to_f32();
        change(&mut values);
        found.insert(name.into(), Tensor::from_f32(found[name].shape(), values).unwrap());
    }

    /// The kept row with the smallest score changes places with the dropped row with the largest.
    fn exchange_closest(found: &mut Tensors, node: &str) {
        let scores = found[&format!("{node}.prune.scores")].to_f32();
        let rows = |part: &str| integers(&found[&format!("{node}.prune.{part}_idx")]).unwrap();
        let (mut keep, drop) = (rows("keep"), rows("remove"));
        let score = |row: &i64| scores[*row as usize];
        let out = (0..keep.len()).min_by(|&a, &b| score(&keep[a]).total_cmp(&score(&keep[b]))).unwrap();
        keep[out] = *drop.iter().max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
        keep.sort_unstable();
        found.insert(format!("{node}.prune.keep_idx"), Tensor::from_i64([keep.len()], keep).unwrap());
    }

    #[test]
    fn what_the_golden_says_passes() {
        assert_eq!(verdict_after("D", |_| {}), Verdict::Pass);
    }

    #[test]
    fn missing_shifted_and_undefined_values_fail() {
        let change_last = |f: fn(&mut f32)| {
            move |found: &mut Tensors| change(found, "plain.logits", |values| f(values.last_mut().unwrap()))
        };
        assert_eq!(verdict_after("D", change_last(|v| *v += 5e-5)), Verdict::Pass);
        assert_eq!(verdict_after("D", change_last(|v| *v += 2e-4)), Verdict::Fail);
        assert_eq!(verdict_after("D", change_last(|v| *v = f32::NAN)), Verdict::Fail);
        assert_eq!(verdict_after("D", |found| drop(found.remove("cache.v.3"))), Verdict::Fail);
        assert_eq!(verdict_after("G", change_last(|v| *v += 0.1)), Verdict::Fail);
        let faster = |values: &mut Vec<f32>| values[7] *= 1.001;
        assert_eq!(verdict_after("D", |found| change(found, "rope.inv_freq", faster)), Verdict::Fail);
    }

    #[test]
    fn other_survivors_are_a_tie_only_within_the_precision() {
        // 0.019 apart in single precision; 0.023 in half, which is within the noise of the scores there.
        assert_eq!(verdict_after("F", |found| exchange_closest(found, "node.h0.i3")), Verdict::Fail);
        assert_eq!(verdict_after("G", |found| exchange_closest(found, "node.h1.i1")), Verdict::Ambiguous);
        assert_eq!(verdict_after("G", |found| exchange_closest(found, "node.h0.i3")), Verdict::Fail);
    }

    #[test]
    fn a_tie_excuses_what_follows_from_it_and_nothing_else() {
        let damaged = |name: &'static str| {
            verdict_after("G", move |found| {
                exchange_closest(found, "node.h1.i1");
                change(found, name, |values| values[0] += 1.0);
            })
        };
        for excused in ["node.h1.i1.out_hidden", "node.h2.i0.in_k.0", "prefix.logits", "teacher.logits"] {
            assert_eq!(damaged(excused), Verdict::Ambiguous, "{excused}");
        }
        for held in ["node.h1.i1.in_hidden", "node.h1.i1.prune.metric_last", "node.h1.i0.out_hidden", "plain.logits"] {
            assert_eq!(damaged(held), Verdict::Fail, "{held}");
        }
    }
}
