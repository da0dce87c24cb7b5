//! Operators against the bodies of their functions: the same graph, with our kernels and without.

use super::model::{session, stock_session};
use super::{noise, run, tensor};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions::{
    LINEAR, LINEAR_BIAS, SELECTIVE_SCAN, STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN, SWIGLU,
};
use accordion_graphs::onnx::{Attribute, Dim, Operator, Scope};
use ort::value::DynValue;
use std::rc::Rc;

/// Name and shape of an input.
type Input = (&'static str, Vec<usize>);

/// A graph of one node, whose inputs have dimensions known at run time only.
fn graph(operator: &Operator, inputs: &[Input], attributes: Vec<(&'static str, Attribute)>, rank: usize) -> Vec<u8> {
    let g = Scope::new("one", Rc::default());
    let dims = |name: &str, rank: usize| (0..rank).map(|i| Dim::from(&*format!("{name}.{i}"))).collect::<Vec<_>>();
    let values: Vec<_> =
        inputs.iter().map(|(name, shape)| g.input(name, DType::F32, &dims(name, shape.len()))).collect();
    let result = vec![(DType::F32, dims("out", rank))];
    g.output("out", &g.call(operator, &values.iter().collect::<Vec<_>>(), attributes, result)[0]);
    g.finish(&[]).unwrap().bytes
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
        let bytes = graph(operator, &inputs, vec![], rank);
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
fn a_scan_refuses_with_the_name_of_what_is_wrong() {
    let inputs = [
        ("u", vec![2, 3, 4]),
        ("dt", vec![2, 3, 4]),
        ("A", vec![4, 5]),
        ("B", vec![2, 3, 5]),
        ("C", vec![2, 3, 5]),
        ("skip", vec![4]),
    ];
    let bytes = graph(&SELECTIVE_SCAN, &inputs, vec![], 3);
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

/// Rows 1 and 4 of each of two segments of 6 rows, for the ratio 3 and the offset 1.
#[test]
fn strided_compression_takes_the_rows_of_every_segment() {
    let (x, x2, weight) = (noise(2 * 6 * 4, 0.37), noise(2 * 6 * 4, 0.48), noise(3 * 4, 0.91));
    let attributes = || vec![("ratio", 3_i64.into()), ("offset", 1_i64.into())];
    let shape = vec![2, 6, 4];
    let one = vec![("x", shape.clone()), ("weight", vec![3, 4])];
    let two = vec![("x", shape.clone()), ("x2", shape), ("weight", vec![3, 4])];
    for (operator, inputs, mean) in [(&STRIDED_COMPRESS, one, false), (&STRIDED_COMPRESS_MEAN, two, true)] {
        let mut session = session(&graph(operator, &inputs, attributes(), 2), 2).unwrap();
        let feed = |window: usize| {
            let rows = |data: &[f32]| tensor([12 / window, window, 4], data.to_vec());
            let mut feed = vec![("x", rows(&x)), ("weight", tensor([3, 4], weight.clone()))];
            if mean {
                feed.push(("x2", rows(&x2)));
            }
            feed
        };
        let (shape, found) = run(&mut session, feed(6)).unwrap().remove(0);
        assert_eq!(shape, [4, 3]);
        for (slot, row) in [1, 4, 7, 10].into_iter().enumerate() {
            for out in 0..3 {
                let value = |i: usize| if mean { 0.5 * (x[row * 4 + i] + x2[row * 4 + i]) } else { x[row * 4 + i] };
                let expected: f32 = (0..4).map(|i| value(i) * weight[out * 4 + i]).sum();
                let found = found[slot * 3 + out];
                assert!((found - expected).abs() < 1e-6, "{} [{slot}, {out}]: {found}, {expected}", operator.name);
            }
        }
        // A segment of 4 rows is not a number of groups of 3, though three of them are.
        assert!(run(&mut session, feed(4)).is_err());
    }
}
