#![allow(clippy::unwrap_used, clippy::float_cmp)]

use super::*;
use crate::parallel::Threads;
use proptest::prelude::*;

fn noise(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i * 2_654_435_761 + seed) % 2000) as f32 / 1000.0 - 1.0).collect()
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The definition of `dequantize`.
fn dequantized<const BITS: u8>(weight: &Weight<'_, BITS>) -> Vec<f32> {
    let numbers: Vec<i8> = if BITS == 8 {
        weight.numbers.iter().map(|&byte| byte as i8).collect()
    } else {
        let signed = |half: u8| if half < 8 { half as i8 } else { half as i8 - 16 };
        weight.numbers.iter().flat_map(|byte| [signed(byte & 15), signed(byte >> 4)]).collect()
    };
    numbers.iter().enumerate().map(|(i, &number)| f32::from(number) * weight.scale[i / weight.block]).collect()
}

fn agrees<const BITS: u8>(rows: usize, blocks: usize, outer: usize, block: usize) {
    let inner = blocks * block;
    let (numbers, scale) = (bytes(outer * inner * usize::from(BITS) / 8), noise(outer * blocks, 3));
    let weight = Weight::<BITS> { outer, inner, block, numbers: &numbers, scale: &scale };
    let x = noise(rows * inner, 1);
    let expanded = dequantized(&weight);
    for level in Level::available() {
        let mut out = vec![f32::NAN; outer * inner];
        weight.dequantize_at(level, &mut out, &Threads(2)).unwrap();
        assert!(out == expanded, "{level:?}: numbers of {BITS} bits in blocks of {block}");

        let mut out = vec![f32::NAN; rows * outer];
        linear_block_at(level, rows, &x, &weight, &mut out, &Threads(2)).unwrap();
        for (i, found) in out.into_iter().enumerate() {
            let (x, w) = (&x[i / outer * inner..][..inner], &expanded[i % outer * inner..][..inner]);
            let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (exact, size) = products.fold((0.0, 0.0), |(sum, size), xw| (sum + xw, size + xw.abs()));
            let bound = 1e-6 * size;
            assert!((f64::from(found) - exact).abs() <= bound, "{level:?} {i}: {found}, expected {exact}");
        }
    }
}

proptest! {
    #[test]
    fn agrees_with_the_definition_at_every_level(
        rows in 0..10_usize, blocks in 0..9_usize, outer in 0..50_usize, power in 4..9_u32
    ) {
        agrees::<8>(rows, blocks, outer, 1 << power);
        agrees::<4>(rows, blocks, outer, 1 << power);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (outer, inner, block) = (1536, 576, 32);
    let (numbers, scale) = (bytes(outer * inner), noise(outer * inner / block, 2));
    let weight = Weight::<8> { outer, inner, block, numbers: &numbers, scale: &scale };
    let x = noise(inner, 4);
    let run = |threads| {
        let mut out = vec![0.0; outer];
        linear_block(1, &x, &weight, &mut out, &Threads(threads)).unwrap();
        out
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn refuses_what_does_not_fit() {
    let refuse = |rows: usize, inner: usize, block, numbers: usize, scale: usize| {
        let (numbers, scale, x) = (vec![0; numbers], vec![0.0; scale], vec![0.0; rows * 32]);
        let weight = Weight::<4> { outer: 2, inner, block, numbers: &numbers, scale: &scale };
        linear_block(rows, &x, &weight, &mut vec![0.0; 2 * rows], &Threads(1)).unwrap_err().to_string()
    };
    assert_eq!(refuse(1, 32, 8, 32, 8), "attribute block_size is 8, expected a power of two of at least 16");
    assert_eq!(refuse(1, 48, 24, 48, 4), "attribute block_size is 24, expected a power of two of at least 16");
    assert_eq!(refuse(1, 32, 64, 32, 1), "x has 32 columns, expected a multiple of block_size, 64");
    assert_eq!(refuse(1, 32, 16, 31, 4), "weight has 31 bytes, expected 32");
    assert_eq!(refuse(1, 32, 16, 32, 5), "scale has 5 elements, expected 4");
    assert_eq!(refuse(1, 48, 16, 48, 6), "x has 32 elements, expected 48");
}
