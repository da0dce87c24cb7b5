//! Tap names in the order of the computation, and the part of the model a tap belongs to.

use std::cmp::Ordering;

/// Stages of a model, a tree node and a layer in the order in which they are computed. A name that begins with none
/// of them comes last.
const STAGES: &[&str] = &[
    "in_hidden",
    "in_position_ids",
    "in_k",
    "in_v",
    "conv",
    "dt",
    "scan",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.out",
    "attn_residual",
    "prune.metric_last",
    "prune.attn_out_hidden",
    "prune.scores",
    "prune.keep_idx",
    "cross.out",
    "cross_residual",
    "mlp.out",
    // Places, sizes and what is given.
    "pos",
    "input_id",
    "position_id",
    "dec_input_ids",
    // The context tree.
    "query",
    "query_vector",
    "candidates",
    "cand_ids",
    "vectors",
    "cand_hidden_last",
    "enc_vectors",
    "similarity",
    "sim",
    "chosen",
    "encoded_ids",
    "encoded_mask",
    "tree",
    "enc",
    "kv",
    // Segments and slots.
    "segments",
    "encoder",
    "enc_hidden",
    "rcc_states",
    "maps",
    "slot_embed",
    "layer_maps",
    "embed",
    "layers",
    "dec_layer_out_raw",
    "dec_hidden",
    "node",
    "out_hidden",
    "out_position_ids",
    "out",
    "injected",
    // The result, and what follows it.
    "prefix",
    "position_ids",
    "last_hidden",
    "cross",
    "running",
    "prompt",
    "prefill",
    "hidden",
    "prefill_logits",
    "prefill_kv",
    "logits",
    "past",
    "decode",
    "generated",
    "step_ids",
    "step_hidden",
    "step_logits",
    "final_kv",
    "teacher",
    "teacher_step",
    "teacher_forced",
    "steps",
    "cache",
    "k",
    "v",
];

/// The part of the model a tap belongs to: its first word and the numbered words after it. `layers.7` for
/// `layers.7.attn.out`, `node.h1.i0` for `node.h1.i0.in_k.3`, `cache` for `cache.k.3`.
pub fn scope(name: &str) -> &str {
    let mut end = name.find('.').unwrap_or(name.len());
    while let Some(rest) = name[end..].strip_prefix('.') {
        let word = rest.split('.').next().unwrap_or_default();
        if word.is_empty() || !word.ends_with(|c: char| c.is_ascii_digit()) {
            break;
        }
        end += 1 + word.len();
    }
    &name[..end]
}

/// Compares two tap names by the order in which the model computes them: scope by scope (numbers as numbers), and
/// stage by stage inside.
pub fn model_order(a: &str, b: &str) -> Ordering {
    let (scope_a, scope_b) = (scope(a), scope(b));
    let rest = |name: &str, scope: &str| name[scope.len()..].trim_start_matches('.').to_owned();
    let (rest_a, rest_b) = (rest(a, scope_a), rest(b, scope_b));
    stage(scope_a)
        .cmp(&stage(scope_b))
        .then_with(|| natural(scope_a, scope_b))
        .then_with(|| stage(&rest_a).cmp(&stage(&rest_b)))
        .then_with(|| {
            // A scope inside a scope: a layer of a segment, or of its encoder.
            let nested = |rest: &str| scope(rest).ends_with(|c: char| c.is_ascii_digit());
            let (inner_a, inner_b) = (inner(&rest_a), inner(&rest_b));
            if nested(&rest_a) && nested(&rest_b) {
                model_order(&rest_a, &rest_b)
            } else if scope(&rest_a) == scope(&rest_b) && !inner_a.is_empty() && !inner_b.is_empty() {
                model_order(inner_a, inner_b)
            } else {
                natural(&rest_a, &rest_b)
            }
        })
}

/// What stands behind the scope of `name`.
fn inner(name: &str) -> &str {
    name[scope(name).len()..].trim_start_matches('.')
}

fn stage(name: &str) -> usize {
    let begins = |stage: &&str| name.strip_prefix(*stage).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    STAGES.iter().position(begins).unwrap_or(STAGES.len())
}

/// Compares strings with runs of digits compared by value.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (digits_a, digits_b) = (leading_digits(a), leading_digits(b));
        if !digits_a.is_empty() && !digits_b.is_empty() {
            let significant = |digits: &str| digits.trim_start_matches('0').to_owned();
            let (value_a, value_b) = (significant(digits_a), significant(digits_b));
            let by_value = value_a.len().cmp(&value_b.len()).then_with(|| value_a.cmp(&value_b));
            if by_value.is_ne() {
                return by_value;
            }
            (a, b) = (&a[digits_a.len()..], &b[digits_b.len()..]);
            continue;
        }
        let (mut rest_a, mut rest_b) = (a.chars(), b.chars());
        match (rest_a.next(), rest_b.next()) {
            (None, None) => return Ordering::Equal,
            (x, y) if x != y => return x.cmp(&y),
            _ => (a, b) = (rest_a.as_str(), rest_b.as_str()),
        }
    }
}

fn leading_digits(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_words_and_their_numbers() {
        assert_eq!(scope("layers.7.attn.out"), "layers.7");
        assert_eq!(scope("node.h1.i0.in_k.3"), "node.h1.i0");
        assert_eq!(scope("cache.k.3"), "cache");
        assert_eq!(scope("prefix.logits"), "prefix");
        assert_eq!(scope("logits"), "logits");
        assert_eq!(scope(""), "");
        assert_eq!(scope("a..b."), "a");
    }

    #[test]
    fn names_sort_as_the_model_computes() {
        let expected = [
            "layers.2.attn.q",
            "layers.2.attn.out",
            "layers.2.mlp.out",
            "layers.2.out",
            "layers.10.attn.q",
            "node.h0.i2.in_hidden",
            "node.h0.i2.in_k.2",
            "node.h0.i2.in_k.10",
            "node.h0.i2.prune.scores",
            "node.h0.i2.prune.keep_idx",
            "node.h0.i2.out_hidden",
            "node.h0.i10.in_hidden",
            "node.h1.i0.in_hidden",
            "prefix.last_hidden",
            "prefix.logits",
            "cache.k.9",
            "cache.k.10",
            "cache.v.0",
            "unheard.of",
        ];
        let mut names = expected;
        names.sort_unstable();
        assert_ne!(names, expected);
        names.sort_by(|a, b| model_order(a, b));
        assert_eq!(names, expected);
    }

    #[test]
    fn segments_trees_and_what_follows_them_sort_as_they_are_computed() {
        let ordered = |expected: &[&str]| {
            let mut names = expected.to_vec();
            names.sort_unstable();
            names.sort_by(|a, b| model_order(a, b));
            assert_eq!(names, expected);
        };
        ordered(&[
            "segments.2.encoder.embed",
            "segments.2.encoder.layers.1.attn.q",
            "segments.2.encoder.layers.1.attn.out",
            "segments.2.encoder.layers.1.mlp.out",
            "segments.2.encoder.layers.1.out",
            "segments.2.encoder.layers.2.conv",
            "segments.2.encoder.layers.2.scan",
            "segments.2.encoder.layers.2.out",
            "segments.2.encoder.layers.10.conv",
            "segments.2.maps.0",
            "segments.2.layers.0.out",
            "segments.2.layers.0.injected",
            "segments.10.encoder.embed",
            "prompt.logits",
            "teacher.logits",
            "cache.k.0",
        ]);
        ordered(&[
            "query.vector",
            "tree.0.similarity",
            "tree.0.chosen",
            "tree.0.encoded_ids",
            "tree.0.layers.1.key",
            "tree.1.similarity",
            "kv.0.value",
            "kv.1.key",
            "running.layers.0.cross.out",
            "running.layers.0.cross_residual",
            "running.logits",
            "steps.0.logits",
        ]);
        ordered(&[
            "tree.d0.sim",
            "tree.d0.chosen",
            "tree.d1.cand_ids",
            "enc.d0.layer0.key",
            "prefill.logits",
            "decode.0.input_id",
            "decode.0.logits",
        ]);
        ordered(&["len1.rcc_states", "len1.prefill_logits", "len1.generated", "len1.final_kv", "len2.rcc_states"]);
    }

    #[test]
    fn numbers_of_any_length_compare() {
        assert_eq!(natural("k.99999999999999999999999", "k.100000000000000000000000"), Ordering::Less);
        assert_eq!(natural("k.007", "k.7"), Ordering::Equal);
    }
}
