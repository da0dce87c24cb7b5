//! `StridedCompress`: the kernels, and the product as it is described to cuBLASLt.

use crate::guarded::Guarded;
use crate::library::{cublaslt, kernels};
use accordion::cuda::{Element, StridedCompress, StridedRows};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
struct Case {
    segments: usize,
    /// Groups in a window.
    groups: usize,
    ratio: usize,
    offset: usize,
    width: usize,
    out_width: usize,
    element: Element,
    mean: bool,
}

/// Small integers, halves of which every type can hold.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 3 + i / 5) % 9) as f32 - 4.0).collect()
}

fn encode(values: &[f32], element: Element) -> Vec<u8> {
    let bytes = |&value: &f32| match element {
        Element::F32 => value.to_le_bytes().to_vec(),
        Element::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Element::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

impl Case {
    fn rows(&self, x: u64, x2: u64, y: u64) -> StridedRows {
        StridedRows {
            x,
            x2,
            y,
            segments: self.segments as i64,
            window: (self.groups * self.ratio) as i64,
            width: self.width as i64,
            ratio: self.ratio as i64,
            offset: self.offset as i64,
            element: self.element,
        }
    }

    /// The kept rows by the definition, from x and x2.
    fn kept(&self, x: &[f32], x2: &[f32]) -> Vec<f32> {
        let rows = (0..self.segments * self.groups).map(|k| (k * self.ratio + self.offset) * self.width);
        rows.flat_map(|at| at..at + self.width)
            .map(|at| if self.mean { (x[at] + x2[at]) / 2.0 } else { x[at] })
            .collect()
    }

    fn check(&self) {
        let count = self.segments * self.groups * self.ratio * self.width;
        let (x, x2) = (numbers(count, 1), numbers(count, 2));
        let weight = numbers(self.out_width * self.width, 3);
        let kept = self.kept(&x, &x2);
        let [x, x2, weight_at] = [&x, &x2, &weight].map(|values| Guarded::of(&encode(values, self.element)));
        let x2_address = if self.mean { x2.address() } else { 0 };

        let y = Guarded::of(&vec![0_u8; kept.len() * self.element.bytes()]);
        let rows = self.rows(x.address(), x2_address, y.address());
        // SAFETY: the tensors have the elements that the lengths say.
        unsafe { kernels().strided_rows(&rows) }.unwrap();
        assert_eq!(y.read(), encode(&kept, self.element));

        let product: Vec<f32> = kept
            .chunks_exact(self.width)
            .flat_map(|row| {
                weight.chunks_exact(self.width).map(|w| row.iter().zip(w).fold(0.0, |sum, (a, b)| sum + a * b))
            })
            .collect();
        let y = Guarded::of(&vec![0_u8; product.len() * self.element.bytes()]);
        let mut call = StridedCompress {
            rows: self.rows(x.address(), x2_address, y.address()),
            weight: weight_at.address(),
            out_width: self.out_width as i64,
            ..StridedCompress::default()
        };
        let workspace = Guarded::of(&vec![0_u8; kernels().strided_compress_workspace(&call)]);
        (call.workspace, call.workspace_bytes) = (workspace.address(), workspace.read().len());
        // SAFETY: as above.
        unsafe { kernels().strided_compress(&call) }.unwrap();
        assert_eq!(y.read(), encode(&product, self.element));
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let element = prop::sample::select(Element::ALL.as_slice());
    let width = prop_oneof![3 => 1_usize..24, 1 => prop::sample::select(vec![64_usize, 100, 128])];
    (1_usize..4, 1_usize..6, 1_usize..9, 0.0..1.0_f64, width, 1_usize..12, element, any::<bool>()).prop_map(
        |(segments, groups, ratio, offset, width, out_width, element, mean)| {
            let offset = (offset * ratio as f64) as usize;
            Case { segments, groups, ratio, offset, width, out_width, element, mean }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a C++ compiler"]
    fn kernels_and_product_are_the_definition(case in any_case()) {
        case.check();
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn long_rows_and_many_rows() {
    for (width, groups) in [(20_000, 2), (1, 20_000), (8, 5000)] {
        for mean in [false, true] {
            Case { segments: 2, groups, ratio: 2, offset: 1, width, out_width: 1, element: Element::F16, mean }.check();
        }
    }
}

/// The mean of a number and itself is that number, whichever of the 65,536 it is; this holds the conversions to theirs.
#[test]
#[ignore = "needs a C++ compiler"]
fn every_half_survives_its_mean() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for element in [Element::F16, Element::Bf16] {
        let (x, y) = (Guarded::of(&all), Guarded::of(&vec![0_u16; all.len()]));
        let case =
            Case { segments: 1, groups: 1, ratio: 1, offset: 0, width: all.len(), out_width: 1, element, mean: true };
        // SAFETY: one row of all halves.
        unsafe { kernels().strided_rows(&case.rows(x.address(), x.address(), y.address())) }.unwrap();
        let is_nan = |bits: u16| match element {
            Element::F16 => f16::from_bits(bits).is_nan(),
            _ => bf16::from_bits(bits).is_nan(),
        };
        // Twice the largest bfloat16s is no float32.
        let doubles = |bits: u16| element == Element::F16 || bits & 0x7fff < 0x7f00 || bits & 0x7fff == 0x7f80;
        for (&from, to) in all.iter().zip(y.read()).filter(|&(&from, _)| is_nan(from) || doubles(from)) {
            assert!(if is_nan(from) { is_nan(to) } else { from == to }, "{from:#06x} {to:#06x}");
        }
    }
}

/// Rounding to half precision is that of the `half` crate.
#[test]
#[ignore = "needs a C++ compiler"]
fn means_are_rounded_to_even() {
    let numbers: Vec<u16> = (0..4096_u32).map(|i| (i * 15 % 0x7c00) as u16).collect();
    let others: Vec<u16> = numbers.iter().rev().copied().collect();
    let (x, x2, y) = (Guarded::of(&numbers), Guarded::of(&others), Guarded::of(&vec![0_u16; numbers.len()]));
    for element in [Element::F16, Element::Bf16] {
        let case = Case { segments: 1, groups: 4, ratio: 1, offset: 0, width: 1024, out_width: 1, element, mean: true };
        // SAFETY: four rows of 1024 elements.
        unsafe { kernels().strided_rows(&case.rows(x.address(), x2.address(), y.address())) }.unwrap();
        for ((&a, &b), found) in numbers.iter().zip(&others).zip(y.read()) {
            let expected = match element {
                Element::F16 => {
                    f16::from_f32(0.5 * (f16::from_bits(a).to_f32() + f16::from_bits(b).to_f32())).to_bits()
                }
                _ => bf16::from_f32(0.5 * (bf16::from_bits(a).to_f32() + bf16::from_bits(b).to_f32())).to_bits(),
            };
            assert_eq!(found, expected, "{a:#06x} {b:#06x}");
        }
    }
}

/// The Rust side and the C side refuse the same calls.
#[test]
#[ignore = "needs a C++ compiler"]
fn what_is_refused() {
    let fine = StridedRows { segments: 0, window: 12, width: 8, ratio: 4, offset: 3, ..StridedRows::default() };
    let refused: [&dyn Fn(&mut StridedRows); 9] = [
        &|c| c.segments = -1,
        &|c| c.window = 13,
        &|c| c.window = 1 << 31,
        &|c| c.width = -1,
        &|c| c.ratio = 0,
        &|c| c.ratio = -4,
        &|c| c.offset = 4,
        &|c| c.offset = -1,
        &|c| c.segments = 1,
    ];
    assert_eq!(fine.launch(), Ok(None));
    // SAFETY: nothing is launched, here and below.
    unsafe { kernels().strided_rows(&fine) }.unwrap();
    for (i, change) in refused.into_iter().enumerate() {
        let mut call = fine;
        change(&mut call);
        assert!(call.launch().is_err(), "{i}");
        assert!(unsafe { kernels().strided_rows(&call) }.is_err(), "{i}");
        let compress = StridedCompress { rows: call, out_width: 4, ..StridedCompress::default() };
        assert!(unsafe { kernels().strided_compress(&compress) }.is_err(), "{i}");
    }
    let missing = c"/nowhere/libcublasLt.so";
    assert!(kernels().open_cublaslt(missing).is_err());
    // A library, but not cuBLASLt.
    assert!(kernels().open_cublaslt(c"libm.so.6").unwrap_err().contains("lacks a function"));
    assert!(cublaslt().is_file());
}
