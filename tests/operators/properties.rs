//! Kernels against the bodies of their functions, which are the executable form of the contracts, on whatever the contracts
//! allow: random shapes, ties, duplicates, everything or as little as possible kept, values that are no numbers.

use super::model::{call, session, stock_session};
use accordion_graphs::dtype::DType::{self, F32, I64};
use accordion_graphs::functions::{
    CACHED_ATTENTION, CAUSAL_ATTENTION, LINEAR, LINEAR_BIAS, MERGE_CACHE, STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN,
    SWIGLU, TOPK_PRUNE,
};
use accordion_graphs::onnx::{Attribute, Operator};
use ort::session::Session;
use ort::value::{DynValue, Tensor};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::RefCell;

/// Elements of the largest tensor of a case; lengths take precedence over the batch.
const ELEMENTS: usize = 1 << 20;

/// One operator with our kernel and without.
struct Sides {
    kernel: RefCell<Session>,
    body: RefCell<Session>,
}

/// Name, shape and elements of an input.
type Feed = Vec<(&'static str, Vec<usize>, Data)>;

#[derive(Clone)]
enum Data {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
}

impl Sides {
    fn new(
        operator: &Operator,
        inputs: &[(&'static str, DType, usize)],
        attributes: Vec<(&'static str, Attribute)>,
        outputs: &[(DType, usize)],
    ) -> Self {
        let bytes = call(operator, inputs, attributes, outputs).unwrap();
        let [kernel, body] =
            [session(&bytes, 2), stock_session(&bytes, 2)].map(|session| RefCell::new(session.unwrap()));
        Self { kernel, body }
    }

    /// The outputs of the kernel and of the body.
    fn run(&self, feed: &Feed) -> [Vec<Output>; 2] {
        [&self.kernel, &self.body].map(|session| outputs(&mut session.borrow_mut(), feed))
    }

    /// Both sides have the same shapes and integers, and floats that differ by at most `tolerance` of what they are, or of
    /// one.
    fn agree(&self, feed: &Feed, tolerance: f32) -> Result<(), TestCaseError> {
        let [kernel, body] = self.run(feed);
        for (i, (found, expected)) in kernel.iter().zip(&body).enumerate() {
            prop_assert_eq!(&found.shape, &expected.shape, "output {}", i);
            match (&found.data, &expected.data) {
                (Data::Integers(found), Data::Integers(expected)) => prop_assert_eq!(found, expected, "output {}", i),
                (Data::Floats(found), Data::Floats(expected)) => close(found, expected, tolerance, i)?,
                _ => prop_assert!(false, "output {i} has two types"),
            }
        }
        Ok(())
    }
}

fn close(found: &[f32], expected: &[f32], tolerance: f32, output: usize) -> Result<(), TestCaseError> {
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        // Infinities differ from themselves by NaN.
        let same = found.total_cmp(&expected).is_eq() || (found.is_nan() && expected.is_nan());
        let near = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        prop_assert!(same || near, "output {output}: {found} at {at}, expected {expected}");
    }
    Ok(())
}

struct Output {
    shape: Vec<i64>,
    data: Data,
}

fn outputs(session: &mut Session, feed: &Feed) -> Vec<Output> {
    let value = |shape: &Vec<usize>, data: &Data| -> DynValue {
        match data.clone() {
            Data::Floats(data) => Tensor::from_array((shape.clone(), data)).unwrap().into_dyn(),
            Data::Integers(data) => Tensor::from_array((shape.clone(), data)).unwrap().into_dyn(),
        }
    };
    let inputs: Vec<_> = feed.iter().map(|(name, shape, data)| (*name, value(shape, data))).collect();
    let outputs = session.run(inputs).unwrap();
    let output = |i: usize| {
        if let Ok((shape, data)) = outputs[i].try_extract_tensor::<f32>() {
            return Output { shape: shape.to_vec(), data: Data::Floats(data.to_vec()) };
        }
        let (shape, data) = outputs[i].try_extract_tensor::<i64>().unwrap();
        Output { shape: shape.to_vec(), data: Data::Integers(data.to_vec()) }
    };
    (0..outputs.len()).map(output).collect()
}

/// A sequence of numbers that a seed decides.
struct Noise(u64);

impl Noise {
    /// 0 to `end - 1`.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    /// Whole numbers from -2 to 2: sums of their products are exact in any order, and often equal.
    fn whole(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.below(5) as f32 - 2.0).collect()
    }

    /// Numbers from -1 to 1.
    fn unit(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.below(2001) as f32 / 1000.0 - 1.0).collect()
    }

    /// `data` with something that is no finite number in a few places, every `width` elements at most one.
    fn spoil(&mut self, data: &mut [f32], width: usize) {
        for row in data.chunks_mut(width.max(1)) {
            if let Some(value) = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY].get(self.below(24)) {
                let at = self.below(row.len());
                row[at] = *value;
            }
        }
    }
}

/// Mostly short, sometimes as long as a context gets.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![24 => 1..60_usize, 6 => 60..1500_usize, 1 => 1500..65_536_usize, 1 => Just(65_536)]
}

/// 1 to 64, of which `each` elements do not get too large.
fn batch(wanted: usize, each: usize) -> usize {
    wanted.min(ELEMENTS / each.max(1)).max(1)
}

fn wanted_batch() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..4_usize, 1 => 4..=64_usize]
}

fn for_all<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(strategy, test).unwrap();
}

#[test]
fn prunes_as_its_body() {
    let inputs = [
        ("query_last", F32, 3),
        ("key", F32, 4),
        ("bias", F32, 1),
        ("position_ids", I64, 2),
        ("hidden", F32, 3),
        ("kv", F32, 6),
        ("keep", I64, 1),
        ("prefix_length", I64, 1),
        ("suffix_length", I64, 1),
    ];
    let outputs = [(I64, 2), (F32, 3), (I64, 2), (F32, 6), (F32, 2), (F32, 3)];
    let sides = Sides::new(&TOPK_PRUNE, &inputs, vec![("scale", 0.5_f32.into())], &outputs);
    let shape = (wanted_batch(), length(), 1..4_usize, 1..4_usize, 1..20_usize, 1..6_usize, 1..4_usize);
    let kept = (0..4_u8, any::<[u16; 3]>());
    for_all(200, &(shape, kept, any::<u64>(), any::<bool>()), |(shape, (how, [p, s, k]), seed, spoiled)| {
        let (wanted, l, g, group, d, width, n) = shape;
        let (b, h) = (batch(wanted, l * (2 * n * g * d).max(width)), g * group);
        let mut noise = Noise(seed);
        // Affixes of a few rows, or of up to all.
        let longest = if how == 0 { l } else { 4.min(l) };
        let prefix = usize::from(p) % (longest + 1);
        let suffix = usize::from(s) % (longest.min(l - prefix) + 1);
        let keep = match how {
            1 => prefix + suffix,
            2 => l,
            _ => prefix + suffix + usize::from(k) % (l - prefix - suffix + 1),
        }
        .max(1);
        let mut query = noise.whole(b * h * d);
        let mut key = noise.whole(b * g * l * d);
        if spoiled {
            // In the first element of a key that is zero otherwise, where no query is zero: the logits are that.
            query.iter_mut().step_by(d).for_each(|x| *x = 1.0);
            for row in key.chunks_mut(d) {
                noise.spoil(&mut row[..1], 1);
                if !row[0].is_finite() {
                    row[1..].fill(0.0);
                }
            }
        }
        // Gaps, duplicates and an order that is not ascending; the last is the largest.
        let position = |i: usize| if i % l + 1 == l { 2 * l } else { (i % l * 7) % l + i % l };
        let integers = |x: usize| Data::Integers(vec![x as i64]);
        let feed = vec![
            ("query_last", vec![b, h, d], Data::Floats(query)),
            ("key", vec![b, g, l, d], Data::Floats(key)),
            ("bias", vec![2 * l + 1], Data::Floats(noise.whole(2 * l + 1))),
            ("position_ids", vec![b, l], Data::Integers((0..b * l).map(|i| position(i) as i64).collect())),
            ("hidden", vec![b, l, width], Data::Floats(noise.unit(b * l * width))),
            ("kv", vec![b, n, 2, g, l, d], Data::Floats(noise.unit(b * n * 2 * g * l * d))),
            ("keep", vec![1], integers(keep)),
            ("prefix_length", vec![1], integers(prefix)),
            ("suffix_length", vec![1], integers(suffix)),
        ];
        sides.agree(&feed, 0.0)
    });
}

#[test]
fn merges_as_its_body() {
    let inputs = [
        ("left_kv", F32, 6),
        ("right_kv", F32, 6),
        ("keep_idx", I64, 2),
        ("new_kv", F32, 6),
        ("prefix_length", I64, 1),
        ("suffix_length", I64, 1),
    ];
    let sides = Sides::new(&MERGE_CACHE, &inputs, vec![], &[(F32, 6)]);
    let shape = (wanted_batch(), [length(), length()], 1..4_usize, 0..3_usize, 1..3_usize, 1..6_usize);
    let affixes = (0..4_usize, 0..4_usize);
    for_all(150, &(shape, affixes, any::<u64>(), length()), |(shape, (prefix, suffix), seed, keep)| {
        let (wanted, contexts, m, n, g, d) = shape;
        let [left, right] = contexts.map(|context| prefix + context + suffix);
        let merged = left + right - prefix - suffix;
        let keep = keep.min(merged);
        let b = batch(wanted, 2 * g * d * (m * left.max(right)).max((m + n) * keep));
        let mut noise = Noise(seed);
        let mut cache = |layers: usize, rows: usize| {
            let shape = vec![b, layers, 2, g, rows, d];
            let mut data = noise.unit(shape.iter().product());
            noise.spoil(&mut data, 50);
            (shape, Data::Floats(data))
        };
        let ((left_shape, left_kv), (right_shape, right_kv)) = (cache(m, left), cache(m, right));
        let (new_shape, new_kv) = cache(n, keep);
        // In any order, and the same one more than once.
        let keep_idx = (0..b * keep).map(|_| noise.below(merged) as i64).collect();
        let feed = vec![
            ("left_kv", left_shape, left_kv),
            ("right_kv", right_shape, right_kv),
            ("keep_idx", vec![b, keep], Data::Integers(keep_idx)),
            ("new_kv", new_shape, new_kv),
            ("prefix_length", vec![1], Data::Integers(vec![prefix as i64])),
            ("suffix_length", vec![1], Data::Integers(vec![suffix as i64])),
        ];
        sides.agree(&feed, 0.0)
    });
}

#[test]
fn gates_as_its_body() {
    let sides = Sides::new(&SWIGLU, &[("gate", F32, 2), ("up", F32, 2)], vec![], &[(F32, 2)]);
    for_all(150, &(length(), 0..40_usize, any::<u64>(), any::<bool>()), |(rows, width, seed, spoiled)| {
        let mut noise = Noise(seed);
        let [mut gate, mut up] = [8.0, 3.0].map(|scale| {
            let unit = noise.unit(rows * width);
            unit.into_iter().map(|x| x * scale).collect::<Vec<f32>>()
        });
        if spoiled {
            noise.spoil(&mut gate, 30);
            noise.spoil(&mut up, 30);
        }
        let shape = vec![rows, width];
        sides.agree(&vec![("gate", shape.clone(), Data::Floats(gate)), ("up", shape, Data::Floats(up))], 2e-6)
    });
}

#[test]
fn multiplies_as_its_body() {
    for (operator, biased) in [(&LINEAR, false), (&LINEAR_BIAS, true)] {
        let mut inputs = vec![("x", F32, 2), ("weight", F32, 2)];
        inputs.extend(biased.then_some(("bias", F32, 1)));
        let sides = Sides::new(operator, &inputs, vec![], &[(F32, 2)]);
        // Up to four rows are ours.
        let rows = prop_oneof![2 => 1..6_usize, 1 => length()];
        let shape = (rows, 1..200_usize, 1..100_usize);
        for_all(100, &(shape, any::<u64>(), any::<bool>()), |((rows, inner, outer), seed, spoiled)| {
            let rows = rows.min(ELEMENTS / inner.max(outer));
            let mut noise = Noise(seed);
            let (mut x, weight) = (noise.unit(rows * inner), noise.unit(outer * inner));
            if spoiled {
                noise.spoil(&mut x, inner * 2);
            }
            let mut feed =
                vec![("x", vec![rows, inner], Data::Floats(x)), ("weight", vec![outer, inner], Data::Floats(weight))];
            feed.extend(biased.then(|| ("bias", vec![outer], Data::Floats(noise.unit(outer)))));
            sides.agree(&feed, 2e-5)
        });
    }
}

#[test]
fn attends_as_its_body() {
    for (heads, kv_heads) in [(1, 1), (4, 2), (9, 3), (5, 1)] {
        let attributes = || vec![("num_heads", (heads as i64).into()), ("kv_num_heads", (kv_heads as i64).into())];
        let new = [("query", F32, 3), ("key", F32, 3), ("value", F32, 3)];
        let past = [("past_key", F32, 4), ("past_value", F32, 4), ("past_length", I64, 1)];
        let outputs = [(F32, 3), (F32, 4), (F32, 4)];
        let causal = Sides::new(&CAUSAL_ATTENTION, &new, attributes(), &outputs);
        let cached = Sides::new(&CACHED_ATTENTION, &[&new[..], &past].concat(), attributes(), &outputs);

        // Many rows, or few behind a past of any length.
        let rows = prop_oneof![
            (1..200_usize).prop_map(|rows| (rows, None)),
            (1..6_usize, length()).prop_map(|(rows, past)| (rows, Some(past)))
        ];
        let shape = (wanted_batch(), rows, prop_oneof![Just(8), Just(16), Just(64)], 0..5_usize);
        for_all(40, &(shape, any::<u64>()), |((wanted, (rows, past), d, spare), seed)| {
            // The body takes a cache that is full or has room for the new rows, and several sequences one row at a time.
            let capacity = past.map_or(0, |past| if spare == 0 { past } else { past + rows + spare - 1 });
            let b = match past {
                Some(_) if rows > 1 => 1,
                _ => batch(wanted, (capacity + rows) * (rows + 8) * d * heads / 8),
            };
            let mut noise = Noise(seed);
            let mut floats = |shape: &[usize]| (shape.to_vec(), Data::Floats(noise.unit(shape.iter().product())));
            let mut feed: Feed = [("query", heads), ("key", kv_heads), ("value", kv_heads)]
                .into_iter()
                .map(|(name, heads)| (name, floats(&[b, rows, heads * d])))
                .map(|(name, (shape, data))| (name, shape, data))
                .collect();
            let Some(past) = past else { return causal.agree(&feed, 1e-5) };
            for name in ["past_key", "past_value"] {
                let (shape, data) = floats(&[b, kv_heads, capacity, d]);
                feed.push((name, shape, data));
            }
            feed.push(("past_length", vec![1], Data::Integers(vec![past as i64])));
            let [kernel, body] = cached.run(&feed);
            let [found, expected] = [&kernel, &body].map(|outputs| {
                // What is behind the new rows is not said to be anything.
                let valid = |output: &Output| match &output.data {
                    Data::Floats(data) if output.shape.len() == 4 => {
                        let plane = output.shape[2] as usize * d;
                        data.chunks(plane).flat_map(|plane| plane[..(past + rows) * d].to_vec()).collect()
                    }
                    Data::Floats(data) => data.clone(),
                    Data::Integers(_) => Vec::new(),
                };
                outputs.iter().map(|output| (output.shape.clone(), valid(output))).collect::<Vec<_>>()
            });
            for (i, ((shape, found), (expected_shape, expected))) in found.iter().zip(&expected).enumerate() {
                prop_assert_eq!(shape, expected_shape);
                close(found, expected, if i == 0 { 1e-5 } else { 0.0 }, i)?;
            }
            Ok(())
        });
    }
}

/// There is no kernel for it on the CPU: the body is held to the definition.
#[test]
fn compresses_as_defined() {
    let shape = (1..=64_usize, 1..40_usize, 1..10_usize, 1..10_usize, 1..6_usize);
    for_all(60, &(shape, any::<u64>()), |((segments, groups, ratio, inner, outer), seed)| {
        let mut noise = Noise(seed);
        let (offset, window) = (noise.below(ratio), groups * ratio);
        let count = segments * window * inner;
        let (x, x2, weight) = (noise.unit(count), noise.unit(count), noise.unit(outer * inner));
        for (operator, mean) in [(&STRIDED_COMPRESS, false), (&STRIDED_COMPRESS_MEAN, true)] {
            let mut inputs = vec![("x", F32, 3)];
            inputs.extend(mean.then_some(("x2", F32, 3)));
            inputs.push(("weight", F32, 2));
            let attributes = vec![("ratio", (ratio as i64).into()), ("offset", (offset as i64).into())];
            let bytes = call(operator, &inputs, attributes, &[(F32, 2)]).unwrap();
            let shape = vec![segments, window, inner];
            let mut feed = vec![("x", shape.clone(), Data::Floats(x.clone()))];
            feed.extend(mean.then(|| ("x2", shape.clone(), Data::Floats(x2.clone()))));
            feed.push(("weight", vec![outer, inner], Data::Floats(weight.clone())));
            let mut expected = Vec::new();
            for row in (0..segments * window).filter(|row| row % ratio == offset) {
                for out in 0..outer {
                    let at = |i: usize| row * inner + i;
                    let value = |i: usize| if mean { 0.5 * (x[at(i)] + x2[at(i)]) } else { x[at(i)] };
                    expected.push((0..inner).map(|i| value(i) * weight[out * inner + i]).sum::<f32>());
                }
            }
            for session in [session(&bytes, 2), stock_session(&bytes, 2)] {
                let found = outputs(&mut session.unwrap(), &feed).remove(0);
                prop_assert_eq!(&found.shape, &[(segments * groups) as i64, outer as i64]);
                if let Data::Floats(found) = &found.data {
                    close(found, &expected, 1e-5, 0)?;
                }
            }
        }
        Ok(())
    });
}

/// Groups of rows would span segments: three segments of four rows are no groups of three, though they are twelve rows.
#[test]
fn a_window_that_the_ratio_does_not_divide_is_refused() {
    let attributes = vec![("ratio", 3_i64.into()), ("offset", 1_i64.into())];
    let bytes = call(&STRIDED_COMPRESS, &[("x", F32, 3), ("weight", F32, 2)], attributes, &[(F32, 2)]).unwrap();
    let tensor = |shape: &[usize]| super::tensor(shape, vec![1.0; shape.iter().product()]);
    let mut session = session(&bytes, 1).unwrap();
    for (segments, window, fits) in [(2, 6, true), (3, 4, false)] {
        let feed = vec![("x", tensor(&[segments, window, 4])), ("weight", tensor(&[3, 4]))];
        assert_eq!(session.run(feed).is_ok(), fits, "{segments} segments of {window}");
    }
}
