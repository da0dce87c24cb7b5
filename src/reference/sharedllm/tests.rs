#![allow(clippy::unwrap_used, clippy::panic)]

use super::super::ReferenceError;
use super::{Injected, Prompt, RunningText, SharedLlm, compress};
use crate::goldens::SharedLlmCase;
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Keep, Quirks, SharedLlmPlan};
use std::collections::BTreeMap;

fn case(name: &str) -> SharedLlmCase {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm");
    SharedLlmCase::open(&folder.join(format!("case_{name}.json"))).unwrap()
}

fn load(case: &SharedLlmCase) -> Result<SharedLlm, ReferenceError> {
    SharedLlm::load(&case.architecture, &case.model, |name| case.weight(name))
}

fn plan(case: &SharedLlmCase, quirks: Quirks) -> SharedLlmPlan {
    let lengths = PromptLengths { prefix: 0, context: case.context_ids.len(), suffix: case.running_ids.len() };
    SharedLlmPlan::new(lengths, case.settings(quirks), ChunkPolicy::Chunks(case.chunks())).unwrap()
}

fn prompt(case: &SharedLlmCase) -> Prompt<'_> {
    let SharedLlmCase { context_ids, context_mask, running_ids, query_index, .. } = case;
    Prompt { context: context_ids, mask: context_mask, running: running_ids, query_index: *query_index }
}

fn compressed(case: &SharedLlmCase, quirks: Quirks) -> Injected {
    compress(&load(case).unwrap(), &plan(case, quirks), prompt(case), &mut NoTaps).unwrap()
}

#[test]
fn a_tree_of_one_level_makes_two_chunks_of_one_as_released() {
    let mut case = case("far10");
    case.tree_depth = 1;
    let [released, repaired] = [Quirks::Faithful, Quirks::Fixed].map(|quirks| compressed(&case, quirks));
    assert_eq!((released.chunks(), released.kept_per_chunk(), released.query_position()), (20, 2, 21));
    assert_eq!((repaired.chunks(), repaired.kept_per_chunk(), repaired.query_position()), (10, 4, 11));
    let expected: Vec<i64> = (0..40).map(|row| row / 2 / 2).collect();
    assert_eq!(released.key_positions(), expected);
    for layer in 0..2 {
        assert_eq!(released.rows(layer), repaired.rows(layer));
    }
}

#[test]
fn a_single_token_has_no_rotation_behind_too_many_chunks() {
    let mut case = case("far10");
    // Heads are 16 wide.
    case.context_ids = case.context_ids.repeat(2);
    case.context_ids.truncate(15 * case.chunk_len);
    case.context_mask = vec![true; case.context_ids.len()];
    let model = load(&case).unwrap();
    let injected = compressed(&case, Quirks::Faithful);
    let mut text = RunningText::new(&model, &injected);
    text.feed(&model, &[1, 2], &mut NoTaps).unwrap();
    let error = text.feed(&model, &[3], &mut NoTaps).unwrap_err();
    assert!(matches!(error, ReferenceError::SingleTokenRotation { chunks: 15, most: 14 }), "{error}");
    assert_eq!(text.next_position(), 2);

    let repaired = compressed(&case, Quirks::Fixed);
    assert!(RunningText::new(&model, &repaired).feed(&model, &[3], &mut NoTaps).is_ok());
    case.context_ids.truncate(14 * case.chunk_len);
    case.context_mask.truncate(14 * case.chunk_len);
    let fewer = compressed(&case, Quirks::Faithful);
    assert!(RunningText::new(&model, &fewer).feed(&model, &[3], &mut NoTaps).is_ok());
}

/// The keys of the first chunk's nodes of the first level in layer 1, `[G, l, d]`.
fn keys_of_first_node(case: &SharedLlmCase, quirks: Quirks) -> Vec<f32> {
    let mut taps = BTreeMap::<String, Tensor>::new();
    compress(&load(case).unwrap(), &plan(case, quirks), prompt(case), &mut taps).unwrap();
    taps["tree.0.layers.1.key"].rows(0..1).to_f32()
}

#[test]
fn padding_reaches_no_token_unless_the_mask_is_that_of_the_other_half() {
    let mut case = case("mask4");
    case.retrieval = false;
    case.keep = Keep::All;
    case.context_mask.fill(true);
    case.context_mask[..3].fill(false); // the beginning of a half that is not halved again
    for (quirks, reached) in [(Quirks::Faithful, true), (Quirks::Fixed, false)] {
        let before = keys_of_first_node(&case, quirks);
        case.context_ids[1] = (case.context_ids[1] + 1) % 128;
        let after = keys_of_first_node(&case, quirks);
        let (heads, rows, width) = (2, 16, 16);
        assert_eq!(before.len(), heads * rows * width);
        let differs =
            |row: usize| (0..width).any(|i| before[row * width + i].to_bits() != after[row * width + i].to_bits());
        assert!(differs(1), "its own keys follow a padded id");
        assert!((0..1).all(|row| !differs(row)));
        assert_eq!((3..rows).any(differs), reached, "{quirks:?}");
    }
    // A node without any token.
    case.context_mask[..16].fill(false);
    assert!(keys_of_first_node(&case, Quirks::Fixed).iter().all(|key| key.is_finite()));
}

#[test]
fn wrong_inputs_are_refused() {
    let case = case("mask4");
    let (model, plan) = (load(&case).unwrap(), plan(&case, Quirks::Faithful));
    let refused = |prompt| compress(&model, &plan, prompt, &mut NoTaps).unwrap_err();
    let good = prompt(&case);
    assert!(matches!(refused(Prompt { query_index: 16, ..good }), ReferenceError::Query { row: 16, running: 16 }));
    assert!(matches!(
        refused(Prompt { context: &good.context[1..], ..good }),
        ReferenceError::Length { what: "context tokens", found: 127, expected: 128 }
    ));
    assert!(matches!(
        refused(Prompt { mask: &[], ..good }),
        ReferenceError::Length { what: "context mask", found: 0, expected: 128 }
    ));
    assert!(matches!(
        refused(Prompt { running: &[1; 16][..15], query_index: 0, ..good }),
        ReferenceError::Length { what: "running tokens", found: 15, expected: 16 }
    ));
    assert!(matches!(refused(Prompt { running: &[128; 16], ..good }), ReferenceError::TokenId { id: 128, .. }));
}

#[test]
fn models_that_do_not_fit_together_are_refused() {
    let refused = |change: fn(&mut SharedLlmCase)| {
        let mut case = case("mask4");
        change(&mut case);
        load(&case).err().unwrap().to_string()
    };
    assert_eq!(
        refused(|case| case.model.injected_layers = 5),
        "injected_layers is 5, expected 1 to 4, the layers of both models"
    );
    assert_eq!(
        refused(|case| case.model.lower.num_kv_heads = 4),
        "num_kv_heads of the lower model is 4, expected 2, as in the upper model"
    );
    assert_eq!(
        refused(|case| case.model.lower.vocab_size = 127),
        "weight `model.embed_tokens.weight` has shape [128, 64], the architecture expects [127, 64]"
    );
}
