#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use proptest::prelude::*;

fn lengths(prefix: usize, context: usize, suffix: usize) -> PromptLengths {
    PromptLengths { prefix, context, suffix }
}

fn settings(max_chunk_len: usize, target_len: usize, layers_warmup: usize, initial: Option<usize>) -> HomerSettings {
    HomerSettings { max_chunk_len, max_initial_chunk_len: initial, target_len, layers_warmup }
}

/// What one published configuration has to become.
struct Case {
    name: &'static str,
    num_layers: usize,
    lengths: PromptLengths,
    settings: HomerSettings,
    layers: &'static [Range<usize>],
    /// Entering, allowed and leaving tokens of every node in the order of execution.
    nodes: &'static [(usize, usize, usize)],
    last_position: usize,
}

/// Schedules that the authors' code was seen to follow.
#[test]
fn small_trees_are_those_of_the_authors() {
    let cases = [
        Case {
            name: "uneven last leaf, one layer left over",
            num_layers: 6,
            lengths: lengths(3, 95, 4),
            settings: settings(32, 32, 2, None),
            layers: &[0..4, 4..5, 5..6],
            nodes: &[(31, 19, 19), (31, 19, 19), (31, 19, 19), (31, 19, 19), (30, 19, 19), (31, 19, 19), (31, 32, 31)],
            last_position: 30,
        },
        Case {
            name: "short right leaf keeps all, its sibling takes the room, root pruned",
            num_layers: 8,
            lengths: lengths(3, 54, 5),
            settings: settings(21, 16, 1, None),
            layers: &[0..5, 5..6, 6..7, 7..8],
            nodes: &[
                (15, 14, 14),
                (15, 14, 14),
                (20, 14, 14),
                (15, 14, 14),
                (15, 14, 14),
                (20, 14, 14),
                (20, 14, 14),
                (15, 14, 14),
                (15, 14, 14),
                (20, 14, 14),
                (15, 16, 15),
                (13, 13, 13),
                (20, 14, 14),
                (20, 14, 14),
                (20, 16, 16),
            ],
            last_position: 14,
        },
        Case {
            name: "smaller leaves, right subtrees cut to one leaf's length",
            num_layers: 8,
            lengths: lengths(6, 100, 7),
            settings: settings(48, 40, 3, Some(30)),
            layers: &[0..5, 5..6, 6..7, 7..8],
            nodes: &[
                (26, 35, 26),
                (26, 26, 26),
                (39, 35, 35),
                (26, 35, 26),
                (26, 26, 26),
                (39, 26, 26),
                (48, 35, 35),
                (26, 35, 26),
                (26, 26, 26),
                (39, 35, 35),
                (26, 39, 26),
                (22, 22, 22),
                (35, 26, 26),
                (48, 26, 26),
                (48, 40, 40),
            ],
            last_position: 25,
        },
        Case {
            name: "one leaf, pruned in the model's last layer",
            num_layers: 4,
            lengths: lengths(2, 25, 3),
            settings: settings(32, 20, 1, None),
            layers: &[Range { start: 0, end: 4 }],
            nodes: &[(30, 20, 20)],
            last_position: 29,
        },
        Case {
            name: "no prefix",
            num_layers: 5,
            lengths: lengths(0, 40, 4),
            settings: settings(28, 28, 1, None),
            layers: &[0..3, 3..5],
            nodes: &[(24, 16, 16), (24, 16, 16), (28, 28, 28)],
            last_position: 23,
        },
        Case {
            name: "fewer layers than heights: inner nodes run nothing and drop nothing",
            num_layers: 4,
            lengths: lengths(2, 60, 3),
            settings: settings(21, 21, 2, None),
            layers: &[0..4, 4..4, 4..4],
            nodes: &[(20, 13, 13), (20, 13, 13), (21, 13, 21), (20, 13, 13), (20, 13, 13), (21, 13, 21), (37, 21, 37)],
            last_position: 19,
        },
    ];
    for case in cases {
        let plan = HomerPlan::new(case.num_layers, case.lengths, case.settings).unwrap();
        let nodes: Vec<_> = plan.nodes.iter().map(|n| (n.in_len, n.target_len, n.out_len)).collect();
        assert_eq!(plan.layers, case.layers, "{}", case.name);
        assert_eq!(nodes, case.nodes, "{}", case.name);
        assert_eq!(plan.last_position(), case.last_position, "{}", case.name);
    }
}

/// Llama-2-7B with affixes of 64 tokens, as the authors' passkey script would run it: total length, leaves, context
/// tokens per leaf, end of the leaves' layers, layers per further height, and the leaf's entering length.
#[test]
fn seven_billion_parameters_at_the_published_lengths() {
    for (total, leaves, leaf_context, leaf_layers, per_height, leaf_len) in [
        (4096, 4, 987, 20, 6, 1115),
        (8192, 8, 1006, 17, 5, 1134),
        (16384, 16, 1015, 16, 4, 1143),
        (32768, 32, 1020, 17, 3, 1148),
        (65536, 64, 1022, 20, 2, 1150),
    ] {
        let plan = HomerPlan::new(32, lengths(64, total - 148, 64), settings(2048, 2048, 12, None)).unwrap();
        assert_eq!((plan.leaves(), plan.leaf_context), (leaves, leaf_context), "{total}");
        assert_eq!(plan.layers[0], 0..leaf_layers, "{total}");
        assert!(plan.layers[1..].iter().all(|layers| layers.len() == per_height), "{total}");
        for node in &plan.nodes {
            let expected = match node.height {
                // The last leaf may be a few tokens shorter.
                0 if node.index + 1 == leaves => (node.in_len, 1088),
                0 => (leaf_len, 1088),
                height if height == plan.tree_height => (2048, 2048),
                _ => (2048, 1088),
            };
            assert_eq!((node.in_len, node.out_len), expected, "{total}, {}", node.tap_scope());
        }
    }
}

#[test]
fn the_suffix_of_a_short_last_leaf_sits_where_all_others_do() {
    let plan = HomerPlan::new(6, lengths(3, 95, 4), settings(32, 32, 2, None)).unwrap();
    let leaves: Vec<_> = plan.nodes.iter().filter(|node| node.height == 0).collect();
    assert_eq!(plan.leaf_positions(leaves[0]), (0..31).collect::<Vec<_>>());
    assert_eq!(plan.leaf_positions(leaves[3]), (0..26).chain(27..31).collect::<Vec<_>>());
}

#[test]
fn lengths_that_the_method_is_not_defined_for_are_refused() {
    let good = (lengths(3, 95, 4), settings(32, 32, 2, None));
    assert!(HomerPlan::new(6, good.0, good.1).is_ok());
    for (what, prompt, settings) in [
        ("context length", lengths(3, 0, 4), good.1),
        ("suffix length", lengths(3, 95, 0), good.1),
        ("max_chunk_len", good.0, settings(7, 32, 2, None)),
        ("max_initial_chunk_len", good.0, settings(32, 32, 2, Some(6))),
        ("target_len", good.0, settings(32, 6, 2, None)),
        ("layers_warmup", good.0, settings(32, 32, 7, None)),
        ("context length", lengths(3, MAX_LEAVES + 1, 4), settings(8, 32, 2, None)),
        ("context length", lengths(usize::MAX, 1, 1), good.1),
        ("context length", lengths(3, usize::MAX - 7, 4), good.1),
    ] {
        match HomerPlan::new(6, prompt, settings) {
            Err(PlanError::OutOfRange { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn a_context_that_leaves_inner_leaves_empty_is_refused() {
    // 5 tokens at 1 a leaf ask for 8 leaves.
    let refused = HomerPlan::new(6, lengths(1, 5, 1), settings(3, 3, 2, None)).unwrap_err();
    assert_eq!(refused, PlanError::EmptyLeaves { context: 5, leaves: 8, leaf_len: 1 });
    // 3 tokens on 4 leaves: only the last one is empty, which works.
    assert_eq!(HomerPlan::new(6, lengths(1, 3, 1), settings(3, 3, 2, None)).unwrap().nodes[4].in_len, 2);
}

fn any_plan() -> impl Strategy<Value = (usize, HomerPlan)> {
    let prompt = (0_usize..12, 1_usize..700, 1_usize..12);
    (1_usize..24, prompt, 2_usize..90, proptest::option::of(2_usize..90), 0_usize..90, 0_usize..24).prop_filter_map(
        "refused",
        |(num_layers, (prefix, context, suffix), capacity, initial, target, warmup)| {
            let affixes = prefix + suffix;
            let settings = settings(affixes + capacity, affixes + target, warmup, initial.map(|c| affixes + c));
            let plan = HomerPlan::new(num_layers, lengths(prefix, context, suffix), settings).ok()?;
            Some((num_layers, plan))
        },
    )
}

proptest! {
    #[test]
    fn layers_partition_the_model((num_layers, plan) in any_plan()) {
        prop_assert_eq!(plan.layers.len(), plan.tree_height + 1);
        let mut next = 0;
        for layers in &plan.layers {
            prop_assert_eq!(layers.start, next);
            next = layers.end;
        }
        prop_assert_eq!(next, num_layers);
        // What the leaves run beyond the others is warm-up and remainder, less than one layer per height.
        let per_height = plan.layers.last().unwrap().len();
        if plan.tree_height > 0 {
            let extra = plan.layers[0].len() - per_height - plan.settings.layers_warmup;
            prop_assert!(extra <= plan.tree_height);
        }
    }

    #[test]
    fn every_context_token_is_in_exactly_one_leaf((_, plan) in any_plan()) {
        let mut next = 0;
        for leaf in plan.nodes.iter().filter(|node| node.height == 0) {
            prop_assert_eq!(leaf.context.start, next);
            next = leaf.context.end;
            prop_assert!(leaf.context.len() == plan.leaf_context || leaf.index + 1 == plan.leaves());
        }
        prop_assert_eq!(next, plan.lengths.context);
    }

    #[test]
    fn children_come_first_and_their_tokens_add_up((_, plan) in any_plan()) {
        let affixes = plan.lengths.prefix + plan.lengths.suffix;
        prop_assert_eq!(plan.nodes.len(), 2 * plan.leaves() - 1);
        for (at, node) in plan.nodes.iter().enumerate() {
            prop_assert_eq!(&node.layers, &plan.layers[node.height]);
            match node.children {
                None => prop_assert_eq!((node.height, node.in_len), (0, affixes + node.context.len())),
                Some(children) => {
                    prop_assert!(children[0] < children[1] && children[1] + 1 == at);
                    let [left, right] = children.map(|child| &plan.nodes[child]);
                    prop_assert_eq!((left.height, left.index), (node.height - 1, 2 * node.index));
                    prop_assert_eq!((right.height, right.index), (node.height - 1, 2 * node.index + 1));
                    prop_assert_eq!(node.in_len, left.out_len + right.out_len - affixes);
                    prop_assert_eq!(&node.context, &(left.context.start..right.context.end));
                    prop_assert_eq!(left.context.end, right.context.start);
                }
            }
        }
        prop_assert_eq!((plan.root().height, plan.root().index), (plan.tree_height, 0));
    }

    #[test]
    fn nodes_keep_the_affixes_and_no_more_than_their_target((_, plan) in any_plan()) {
        let affixes = plan.lengths.prefix + plan.lengths.suffix;
        for node in &plan.nodes {
            prop_assert!(node.out_len >= affixes && node.out_len <= node.in_len);
            if node.layers.is_empty() {
                prop_assert_eq!(node.removed(), 0);
            } else {
                prop_assert!(node.out_len <= node.target_len);
                prop_assert!(node.removed() == 0 || node.out_len == node.target_len);
                // Two pruned children fit into one chunk again.
                prop_assert!(node.height == 0 || node.in_len <= plan.settings.max_chunk_len);
            }
        }
    }

    #[test]
    fn positions_stay_within_one_leaf((_, plan) in any_plan()) {
        for leaf in plan.nodes.iter().filter(|node| node.height == 0) {
            let positions = plan.leaf_positions(leaf);
            prop_assert_eq!(positions.len(), leaf.in_len);
            prop_assert!(positions.is_sorted_by(|a, b| a < b));
            prop_assert_eq!(positions.last().copied(), Some(plan.last_position() as i64));
            prop_assert_eq!(plan.max_distance(), plan.last_position());
        }
    }
}
