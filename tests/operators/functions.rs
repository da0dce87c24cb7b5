//! Operators against the bodies of their functions: the same graph, with our kernels and without.

use super::model::{call, session, stock_session};
use super::{integers, noise, run, tensor};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions::{
    CACHED_ATTENTION_BF16, CAUSAL_ATTENTION_BF16, LINEAR, LINEAR_BIAS, SELECTIVE_SCAN, SWIGLU,
};
use accordion_graphs::onnx::Operator;
use ort::value::DynValue;

/// Name and shape of an input.
type Input = (&'static str, Vec<usize>);

fn float_graph(operator: &Operator, inputs: &[Input], rank: usize) -> Vec<u8> {
    let inputs: Vec<_> = inputs.iter().map(|(name, shape)| (*name, DType::F32, shape.len())).collect();
    call(operator, &inputs, vec![], &[(DType::F32, rank)]).unwrap()
}

fn feed(inputs: &[Input]) -> Vec<(&'static str, DynValue)> {
    let filled = |(i, (name, shape)): (usize, &Input)| {
        let step = 0.37 + 0.11 * i as f32;
        let mut data = noise(shape.iter().product(), step);
        match *name {
            // Step sizes are positive and decays negative.
            "dt" => data.iter_mut().for_each(|x| *x = x.abs()),
            "A" => data.iter_mut().for_each(|x| *x = -x.abs()),
            _ => {}
        }
        (*name, tensor(shape.clone(), data))
    };
    inputs.iter().enumerate().map(filled).collect()
}

#[test]
fn kernels_agree_with_the_bodies_of_their_functions() {
    let linear = |rows, bias: bool| {
        let mut inputs = vec![("x", vec![rows, 24]), ("weight", vec![40, 24])];
        inputs.extend(bias.then(|| ("bias", vec![40])));
        inputs
    };
    let scan = |segments, window, channels, states| {
        let (wide, narrow) = (vec![segments, window, channels], vec![segments, window, states]);
        vec![
            ("u", wide.clone()),
            ("dt", wide),
            ("A", vec![channels, states]),
            ("B", narrow.clone()),
            ("C", narrow),
            ("skip", vec![channels]),
        ]
    };
    // Few rows take our kernel of a linear layer, more the runtime's.
    let cases: Vec<(&Operator, Vec<Input>, usize)> = vec![
        (&LINEAR, linear(1, false), 2),
        (&LINEAR, linear(9, false), 2),
        (&LINEAR_BIAS, linear(1, true), 2),
        (&LINEAR_BIAS, linear(9, true), 2),
        (&SELECTIVE_SCAN, scan(1, 50, 128, 16), 3),
        (&SELECTIVE_SCAN, scan(3, 7, 21, 5), 3),
        (&SELECTIVE_SCAN, scan(2, 1, 3, 1), 3),
        (&SWIGLU, vec![("gate", vec![3, 7]), ("up", vec![3, 7])], 2),
    ];
    for (operator, inputs, rank) in cases {
        let bytes = float_graph(operator, &inputs, rank);
        let [found, expected] = [session(&bytes, 2), stock_session(&bytes, 2)]
            .map(|session| run(&mut session.unwrap(), feed(&inputs)).unwrap().remove(0));
        let what = format!("{} of {inputs:?}", operator.name);
        assert_eq!(found.0, expected.0, "{what}: shapes");
        for (i, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
            assert!((found - expected).abs() <= 1e-5, "{what}: {found} at {i}, expected {expected}");
        }
        assert!(expected.1.iter().any(|x| x.abs() > 0.1), "{what}: nothing is computed");
    }
}

#[test]
fn attention_rounds_what_its_body_rounds() {
    let (heads, groups, dim) = (4, 2, 64);
    // Few rows are multiplied in single precision, and many in pairs, whose weights lose half a unit in the last of 8 bits.
    for (past, rows, bound) in [(0, 5, 1e-5), (0, 77, 2.2e-3), (40, 1, 1e-5), (40, 130, 2.2e-3)] {
        let mut inputs: Vec<Input> = [("query", heads), ("key", groups), ("value", groups)]
            .map(|(name, heads)| (name, vec![1, rows, heads * dim]))
            .into();
        let cache = vec![1, groups, past + rows, dim];
        let operator = if past == 0 { &CAUSAL_ATTENTION_BF16 } else { &CACHED_ATTENTION_BF16 };
        if past > 0 {
            inputs.extend([("past_key", cache.clone()), ("past_value", cache.clone())]);
        }
        let mut types: Vec<_> = inputs.iter().map(|(name, shape)| (*name, DType::F32, shape.len())).collect();
        types.extend((past > 0).then_some(("past_length", DType::I64, 1)));
        let attributes = vec![("num_heads", heads.into()), ("kv_num_heads", groups.into())];
        let bytes = call(operator, &types, attributes, &[(DType::F32, 3), (DType::F32, 4), (DType::F32, 4)]).unwrap();
        let [found, expected] = [session(&bytes, 2), stock_session(&bytes, 2)].map(|session| {
            let mut values = feed(&inputs);
            values.extend((past > 0).then(|| ("past_length", integers(&[past as i64]))));
            run(&mut session.unwrap(), values).unwrap()
        });
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.0, expected.0, "{past} + {rows}: shape of output {i}");
            let bound = if i == 0 { bound } else { 0.0 };
            let worst = found.1.iter().zip(&expected.1).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst <= bound, "{past} + {rows}: output {i} is off by {worst}");
        }
        let kept = &found[1].1[past * dim..(past + 1) * dim];
        assert!(kept.iter().all(|x| x.to_bits().trailing_zeros() >= 16), "{past} + {rows}: keys are stored rounded");
    }
}

#[test]
fn a_scan_refuses_with_the_name_of_what_is_wrong() {
    let inputs = [
        ("u", vec![2, 3, 4]),
        ("dt", vec![2, 3, 4]),
        ("A", vec![4, 5]),
        ("B", vec![2, 3, 5]),
        ("C", vec![2, 3, 5]),
        ("skip", vec![4]),
    ];
    let bytes = float_graph(&SELECTIVE_SCAN, &inputs, 3);
    for (which, shape, expected) in [
        (1, vec![2, 3, 5], "dt has shape [2, 3, 5], expected [2, 3, 4]"),
        (2, vec![5, 5], "A has shape [5, 5], expected [4, 5]"),
        (3, vec![2, 3, 4], "B has shape [2, 3, 4], expected [2, 3, 5]"),
        (4, vec![1, 3, 5], "C has shape [1, 3, 5], expected [2, 3, 5]"),
        (5, vec![5], "skip has shape [5], expected [4]"),
    ] {
        let mut inputs = inputs.clone();
        inputs[which].1 = shape;
        let message = run(&mut session(&bytes, 1).unwrap(), feed(&inputs)).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
}
