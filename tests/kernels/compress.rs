//! `StridedCompress`: the kernels, and the product as it is described to cuBLASLt.

use crate::guarded::Guarded;
use crate::library::{Emulator, cublaslt, kernels};
use accordion::cuda::{Element, StridedCompress, StridedRows};
use accordion::selftest::compress::Case;
use half::{bf16, f16};
use proptest::prelude::*;

fn check(case: &Case) {
    let tensors = case.tensors();
    let compressed = case.on(&Emulator, &tensors).unwrap();
    assert!(compressed.product.is_some());
    assert_eq!(compressed.difference(&case.expected(&tensors)), None, "{case:?}");
}

fn halves(memory: &Guarded) -> Vec<u16> {
    memory.read().as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect()
}

fn guarded(halves: &[u16]) -> Guarded {
    Guarded::of(&halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>())
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
        check(&case);
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn long_rows_and_many_rows() {
    for (width, groups) in [(20_000, 2), (1, 20_000), (8, 5000)] {
        for mean in [false, true] {
            check(&Case {
                segments: 2,
                groups,
                ratio: 2,
                offset: 1,
                width,
                out_width: 1,
                element: Element::Bf16,
                mean,
            });
        }
    }
}

/// The mean of a number and itself is that number, whichever of the 65,536 it is; this holds the conversions to theirs.
#[test]
#[ignore = "needs a C++ compiler"]
fn every_half_survives_its_mean() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for element in [Element::F16, Element::Bf16] {
        let (x, y) = (guarded(&all), guarded(&vec![0; all.len()]));
        let case =
            Case { segments: 1, groups: 1, ratio: 1, offset: 0, width: all.len(), out_width: 1, element, mean: true };
        // SAFETY: one row of all halves.
        unsafe { kernels().strided_rows(&case.rows([x.address(), x.address(), y.address()])) }.unwrap();
        let is_nan = |bits: u16| match element {
            Element::F16 => f16::from_bits(bits).is_nan(),
            _ => bf16::from_bits(bits).is_nan(),
        };
        // Twice the largest bfloat16s is no float32.
        let doubles = |bits: u16| element == Element::F16 || bits & 0x7fff < 0x7f00 || bits & 0x7fff == 0x7f80;
        for (&from, to) in all.iter().zip(halves(&y)).filter(|&(&from, _)| is_nan(from) || doubles(from)) {
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
    let (x, x2, y) = (guarded(&numbers), guarded(&others), guarded(&vec![0; numbers.len()]));
    for element in [Element::F16, Element::Bf16] {
        let case = Case { segments: 1, groups: 4, ratio: 1, offset: 0, width: 1024, out_width: 1, element, mean: true };
        // SAFETY: four rows of 1024 elements.
        unsafe { kernels().strided_rows(&case.rows([x.address(), x2.address(), y.address()])) }.unwrap();
        for ((&a, &b), found) in numbers.iter().zip(&others).zip(halves(&y)) {
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
    // SAFETY: nothing is launched.
    unsafe { kernels().strided_rows(&fine) }.unwrap();
    for (i, change) in refused.into_iter().enumerate() {
        let mut call = fine;
        change(&mut call);
        assert!(call.launch().is_err(), "{i}");
        // SAFETY: nothing is launched.
        let refused = unsafe { kernels().strided_rows(&call) };
        assert!(refused.is_err(), "{i}");
        let compress = StridedCompress { rows: call, out_width: 4, ..StridedCompress::default() };
        // SAFETY: nothing is launched.
        let refused = unsafe { kernels().strided_compress(&compress) };
        assert!(refused.is_err(), "{i}");
    }
    let missing = c"/nowhere/libcublasLt.so";
    assert!(kernels().open_cublaslt(missing).is_err());
    // A library, but not cuBLASLt.
    assert!(kernels().open_cublaslt(c"libm.so.6").unwrap_err().contains("lacks a function"));
    assert!(cublaslt().is_file());
}
