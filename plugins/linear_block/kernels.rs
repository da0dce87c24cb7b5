//! The kernels of each instruction set behind one table of function pointers.

// Indices say which register is meant; forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

use super::vectors::Expand;
use super::{Bits, ROWS_AT_ONCE, SIDE_BY_SIDE};
use crate::simd::{AHEAD, Level, Portable, prefetch};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};

/// Scales in a cache line.
const SCALES_OF_LINE: usize = 16;

/// What [`dots`] reads.
#[derive(Clone, Copy)]
pub(super) struct Dots {
    /// Rows of activations in the order of [`arrange`].
    pub(super) x: *const f32,
    /// Elements from one of them to the next.
    pub(super) x_stride: usize,
    /// `[outer, inner]`, of 8 or 4 bits.
    pub(super) weight: *const u8,
    /// `[outer, inner / block]`.
    pub(super) scale: *const f32,
    /// Numbers of a weight row, a multiple of `block`.
    pub(super) inner: usize,
    /// Numbers of a scale, a power of two and at least 16.
    pub(super) block: usize,
}

/// Sums of products of rows of activations with rows of the weight.
pub(super) type Sums = [[f32; SIDE_BY_SIDE]; ROWS_AT_ONCE];

type Dot = unsafe fn(&Dots, &[usize; SIDE_BY_SIDE], &mut Sums);

/// The kernels of one level and one size of numbers.
pub(super) struct Kernels {
    /// Numbers of a chunk.
    pub(super) chunk: usize,
    /// [`arrange`].
    pub(super) arrange: unsafe fn(&[f32], &mut [f32]),
    /// [`dots`] for 1, 2, ... rows.
    pub(super) dots: [Dot; ROWS_AT_ONCE],
    /// [`dequantize`].
    pub(super) dequantize: unsafe fn(&[u8], &[f32], usize, &mut [f32]),
}

/// Instantiates the table of one level and one size.
macro_rules! table {
    ($vector:ty, $bits:literal, $($feature:literal)?) => {{
        $(#[target_feature(enable = $feature)])?
        unsafe fn arrange_of(x: &[f32], to: &mut [f32]) {
            arrange::<$vector>(x, to);
        }
        $(#[target_feature(enable = $feature)])?
        unsafe fn dots_of<const ROWS: usize>(at: &Dots, rows: &[usize; SIDE_BY_SIDE], sums: &mut Sums) {
            // SAFETY: passed on from the caller.
            unsafe { dots::<$vector, $bits, ROWS>(at, rows, sums) }
        }
        $(#[target_feature(enable = $feature)])?
        unsafe fn dequantize_of(weight: &[u8], scale: &[f32], block: usize, to: &mut [f32]) {
            dequantize::<$bits>(weight, scale, block, to);
        }
        static TABLE: Kernels = Kernels {
            chunk: 4 * <$vector as crate::simd::Simd>::LANES,
            arrange: arrange_of,
            dots: [dots_of::<1>, dots_of::<2>, dots_of::<3>, dots_of::<4>],
            dequantize: dequantize_of,
        };
        &TABLE
    }};
}

impl Kernels {
    /// The kernels of `level`, or of the widest narrower one that this processor has.
    pub(super) fn of<const BITS: Bits>(level: Level) -> &'static Self {
        match (level.min(Level::detect()), BITS) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, 8) => table!(Avx512, 8, "avx512f,avx512dq"),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, _) => table!(Avx512, 4, "avx512f,avx512dq"),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, 8) => table!(Avx2, 8, "avx2,fma"),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => table!(Avx2, 4, "avx2,fma"),
            (_, 8) => table!(Portable, 8,),
            _ => table!(Portable, 4,),
        }
    }
}

/// The row `x` in the order in which [`Expand`] gives the weights, with zeros behind its end.
#[inline(always)]
fn arrange<V: Expand>(x: &[f32], to: &mut [f32]) {
    let place = |i: usize| i % 4 * V::LANES + i / 4;
    let (from, rest) = x.split_at(x.len() / (4 * V::LANES) * 4 * V::LANES);
    let (whole, last) = to.split_at_mut(from.len());
    for (from, to) in from.chunks_exact(4 * V::LANES).zip(whole.chunks_exact_mut(4 * V::LANES)) {
        for i in 0..4 * V::LANES {
            to[place(i)] = from[i];
        }
    }
    last.fill(0.0);
    for (i, x) in rest.iter().enumerate() {
        last[place(i)] = *x;
    }
}

/// Sums of products of `ROWS` rows of activations with these rows of the weight.
///
/// # Safety
///
/// The instruction set of `V` is there, and everything [`Dots`] names is good for `ROWS` rows of whole chunks and for these
/// rows of the weight.
#[inline(always)]
unsafe fn dots<V: Expand, const BITS: Bits, const ROWS: usize>(
    at: &Dots,
    rows: &[usize; SIDE_BY_SIDE],
    sums: &mut Sums,
) {
    let chunk = 4 * V::LANES;
    let whole = at.inner / chunk * chunk;
    let block_shift = at.block.ilog2();
    let blocks = at.inner >> block_shift;
    // Four numbers share a lane.
    let shift = block_shift - 2;
    // SAFETY: whole chunks below `inner`; the rest of the weight and its scales go through chunks of their own.
    unsafe {
        let mut lanes = [[V::splat(0.0); SIDE_BY_SIDE]; ROWS];
        let weights = rows.map(|row| at.weight.add(bytes::<BITS>(row * at.inner)));
        let scales = rows.map(|row| at.scale.add(row * blocks));
        // A quarter as far: so many fewer bytes than 4-bit numbers in blocks of 32 are their scales.
        for scale in scales {
            for line in (0..blocks).step_by(SCALES_OF_LINE) {
                prefetch(scale.wrapping_add(line).wrapping_byte_add(AHEAD / 4));
            }
        }
        for i in (0..whole).step_by(chunk) {
            let x = at.x.add(i);
            for w in 0..SIDE_BY_SIDE {
                let (weight, scale) = (weights[w].add(bytes::<BITS>(i)), scales[w].add(i >> block_shift));
                prefetch(weight.wrapping_add(AHEAD));
                add::<V, BITS, ROWS>(&mut lanes, w, x, at.x_stride, weight, scale, shift);
            }
        }
        if whole < at.inner {
            let (x, first) = (at.x.add(whole), whole >> block_shift);
            for w in 0..SIDE_BY_SIDE {
                let (mut weight, mut scale) = ([0_u8; 64], [0.0_f32; 16]);
                let from = weights[w].add(bytes::<BITS>(whole));
                std::ptr::copy_nonoverlapping(from, weight.as_mut_ptr(), bytes::<BITS>(at.inner - whole));
                std::ptr::copy_nonoverlapping(scales[w].add(first), scale.as_mut_ptr(), blocks - first);
                add::<V, BITS, ROWS>(&mut lanes, w, x, at.x_stride, weight.as_ptr(), scale.as_ptr(), shift);
            }
        }
        for row in 0..ROWS {
            sums[row] = V::totals(lanes[row]);
        }
    }
}

/// Bytes of so many numbers.
#[inline(always)]
fn bytes<const BITS: Bits>(numbers: usize) -> usize {
    numbers * usize::from(BITS) / 8
}

/// Adds the products of a chunk of weight row `w` with `ROWS` rows of activations.
///
/// # Safety
///
/// The instruction set of `V` is there; behind all pointers is a chunk, behind `scale` its scales.
#[inline(always)]
unsafe fn add<V: Expand, const BITS: Bits, const ROWS: usize>(
    lanes: &mut [[V; SIDE_BY_SIDE]; ROWS],
    w: usize,
    x: *const f32,
    x_stride: usize,
    weight: *const u8,
    scale: *const f32,
    shift: u32,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let weights = V::expand::<BITS>(weight);
        let scale = V::spread(scale, shift);
        for row in 0..ROWS {
            let x = x.add(row * x_stride);
            let mut sum = weights[0].mul(V::load(x));
            for j in 1..4 {
                sum = weights[j].mul_add(V::load(x.add(j * V::LANES)), sum);
            }
            lanes[row][w] = sum.mul_add(scale, lanes[row][w]);
        }
    }
}

/// Numbers of the weight times their scales, in their order, to as many elements of `to`.
#[inline(always)]
fn dequantize<const BITS: Bits>(weight: &[u8], scale: &[f32], block: usize, to: &mut [f32]) {
    let blocks = weight.chunks_exact(block * usize::from(BITS) / 8).zip(to.chunks_exact_mut(block));
    for ((weight, to), scale) in blocks.zip(scale) {
        if BITS == 8 {
            for (number, to) in weight.iter().zip(to) {
                *to = f32::from(*number as i8) * scale;
            }
        } else {
            for (pair, to) in weight.iter().zip(to.chunks_exact_mut(2)) {
                to[0] = f32::from((pair << 4) as i8 >> 4) * scale;
                to[1] = f32::from(*pair as i8 >> 4) * scale;
            }
        }
    }
}
