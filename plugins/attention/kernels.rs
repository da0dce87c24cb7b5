//! The kernels of each instruction set behind one table of function pointers.

use super::halves::Halves;
use super::softmax::{Strip, absorb};
#[cfg(target_arch = "x86_64")]
use super::tile::Pairs;
use super::tile::{Single, Weighing, logits, weigh};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, Simd};

type Logits = unsafe fn(usize, f32, *const f32, *const f32, *mut f32, usize);
type Weigh = unsafe fn(&Weighing);

/// The kernels of one level, and the tile sizes they were made for.
pub(super) struct Kernels {
    /// Elements per vector.
    pub(super) lanes: usize,
    /// What makes elements that hold two numbers; without it, each holds one.
    pub(super) halves: Option<&'static Halves>,
    /// Keys per packed panel.
    pub(super) panel: usize,
    /// [`logits`] for 1, 2, ... rows.
    pub(super) logits: &'static [Logits],
    /// [`weigh`] by vectors per row, then for 1, 2, ... rows.
    pub(super) weigh: &'static [&'static [Weigh]],
    /// [`absorb`].
    pub(super) absorb: unsafe fn(&Strip),
    /// [`Simd::transpose`].
    pub(super) transpose: unsafe fn(*const f32, usize, *mut f32, usize),
}

/// Instantiates the table of one level: `$keys` vectors per panel, and for [`weigh`] as many rows as leave the sums in
/// registers.
macro_rules! table {
    ($name:ident, $vector:ty, $elements:ty, $halves:expr, $($feature:literal)?, $keys:literal, [$($m:literal)*], [$([$n:literal: $($r:literal)*])*]) => {
        static $name: Kernels = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn logits_of<const M: usize>(
                depth: usize, scale: f32, rows: *const f32, panel: *const f32, out: *mut f32, stride: usize,
            ) {
                // SAFETY: passed on from the caller.
                unsafe { logits::<$vector, $elements, M, $keys>(depth, scale, rows, panel, out, stride) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn weigh_of<const M: usize, const N: usize>(at: &Weighing) {
                // SAFETY: passed on from the caller.
                unsafe { weigh::<$vector, $elements, M, N>(at) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn absorb_of(strip: &Strip) {
                // SAFETY: passed on from the caller.
                unsafe { absorb::<$vector>(strip) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn transpose_of(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
                // SAFETY: passed on from the caller.
                unsafe { <$vector>::transpose(from, stride, to, to_stride) }
            }
            Kernels {
                lanes: <$vector>::LANES,
                halves: $halves,
                panel: $keys * <$vector>::LANES,
                logits: &[$(logits_of::<$m>),*],
                weigh: &[$(&[$(weigh_of::<$r, $n>),*]),*],
                absorb: absorb_of,
                transpose: transpose_of,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
table!(AVX512_BF16, Avx512, Pairs, Some(&Halves::AVX512), "avx512f,avx512dq,avx512bf16", 3, [1 2 3 4 5 6 7 8],
    [[1: 1 2 3 4 5 6 7 8] [2: 1 2 3 4 5 6 7 8 9 10 11 12] [3: 1 2 3 4 5 6 7 8] [4: 1 2 3 4 5 6]]);
#[cfg(target_arch = "x86_64")]
table!(AVX512, Avx512, Single, None, "avx512f,avx512dq", 3, [1 2 3 4 5 6 7 8],
    [[1: 1 2 3 4 5 6 7 8] [2: 1 2 3 4 5 6 7 8 9 10 11 12] [3: 1 2 3 4 5 6 7 8] [4: 1 2 3 4 5 6]]);
#[cfg(target_arch = "x86_64")]
table!(AVX2, Avx2, Single, None, "avx2,fma", 3, [1 2 3 4], [[1: 1 2 3 4 5 6] [2: 1 2 3 4 5 6] [3: 1 2 3 4]]);
table!(PORTABLE, Portable, Single, None, , 2, [1 2 3 4], [[1: 1 2 3 4] [2: 1 2 3 4]]);

impl Kernels {
    /// The kernels of `level`, or of the widest narrower one that this processor has.
    pub(super) fn of(level: Level) -> &'static Self {
        match level.min(Level::detect()) {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &AVX2,
            _ => &PORTABLE,
        }
    }

    /// Those that multiply numbers of type bfloat16, for heads of `dim` elements: none if this processor has none, or they
    /// do not fit.
    pub(super) fn of_bf16(level: Level, dim: usize) -> Option<&'static Self> {
        #[cfg(target_arch = "x86_64")]
        if level.min(Level::detect()) == Level::Avx512
            && is_x86_feature_detected!("avx512bf16")
            && dim.is_multiple_of(2 * AVX512_BF16.lanes)
        {
            return Some(&AVX512_BF16);
        }
        let _ = (level, dim);
        None
    }
}
