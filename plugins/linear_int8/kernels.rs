//! The kernels of each instruction set behind one table of function pointers.

// Indices say which register is meant; forced inlining is what a kernel needs to be compiled for an instruction set.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
use super::vectors::{Avx2Bytes, Avx512Vnni, AvxVnni};
use super::vectors::{Bytes, Level, Portable};
use super::{InputScale, MAX_DOT_ROWS, SIDE_BY_SIDE, quantize};
use crate::simd::{AHEAD, prefetch};

/// Where a register tile reads and writes. A quad is four bytes after each other in a row.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Quads of a row.
    pub(super) quads: usize,
    /// Quantized activations.
    pub(super) rows: *const i8,
    /// Bytes from one of them to the next.
    pub(super) stride: usize,
    /// What the sums of each row start from.
    pub(super) starts: *const i32,
    /// What one of each row's numbers stands for.
    pub(super) row_scales: *const f32,
    /// A panel of the weight.
    pub(super) panel: *const i8,
    /// What one of each column's numbers stands for.
    pub(super) scales: *const f32,
    /// Rows of results.
    pub(super) out: *mut f32,
    /// Elements from one of them to the next.
    pub(super) out_stride: usize,
}

/// Most results of a tile.
pub(super) const MAX_TILE: usize = 512;

type Dots = unsafe fn(*const i8, usize, *const i32, *const i8, &[usize; SIDE_BY_SIDE], usize, &mut Sums);

type Quantize = unsafe fn(&[f32], &[f32], InputScale, &mut [i8]) -> (i32, f32);

/// Sums of products of rows of activations with rows of the weight.
pub(super) type Sums = [[i32; SIDE_BY_SIDE]; MAX_DOT_ROWS];

/// The kernels of one level, and the tile sizes they were made for.
pub(super) struct Kernels {
    /// Columns of a panel.
    pub(super) columns: usize,
    /// [`tile`] for 1, 2, ... rows.
    pub(super) tile: &'static [unsafe fn(&Tile)],
    /// [`pack`].
    pub(super) pack: unsafe fn(&[i8], usize, &mut [i8]),
    /// [`dots`] for 1, 2, ... rows.
    pub(super) dots: [Dots; MAX_DOT_ROWS],
    /// [`quantize::quantize`].
    pub(super) quantize: Quantize,
}

/// Instantiates the table of one level: `$n` vectors per panel, and as many rows as leave the sums in registers.
macro_rules! table {
    ($name:ident, $vector:ty, $($feature:literal)?, $n:literal, [$($m:literal)*]) => {
        static $name: Kernels = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn tile_of<const M: usize>(at: &Tile) {
                // SAFETY: passed on from the caller.
                unsafe { tile::<$vector, M, $n>(at) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn pack_of(weight: &[i8], inner: usize, panel: &mut [i8]) {
                // SAFETY: passed on from the caller.
                unsafe { pack::<$vector, $n>(weight, inner, panel) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn dots_of<const ROWS: usize>(
                rows: *const i8, stride: usize, starts: *const i32, weight: *const i8, places: &[usize; SIDE_BY_SIDE],
                inner: usize, sums: &mut Sums,
            ) {
                // SAFETY: passed on from the caller.
                unsafe { dots::<$vector, ROWS>(rows, stride, starts, weight, places, inner, sums) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn quantize_of(x: &[f32], smoothing: &[f32], scale: InputScale, to: &mut [i8]) -> (i32, f32) {
                quantize::quantize(x, smoothing, scale, to)
            }
            const _: () = assert!([$($m),*].len() * $n * <$vector>::LANES <= MAX_TILE);
            Kernels {
                columns: $n * <$vector>::LANES,
                tile: &[$(tile_of::<$m>),*],
                pack: pack_of,
                dots: [dots_of::<1>, dots_of::<2>, dots_of::<3>, dots_of::<4>],
                quantize: quantize_of,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
table!(AVX512_VNNI, Avx512Vnni, "avx512f,avx512dq,avx512bw,avx512vnni", 4, [1 2 3 4 5 6]);
#[cfg(target_arch = "x86_64")]
table!(AVX_VNNI, AvxVnni, "avx2,fma,avxvnni", 3, [1 2 3 4]);
#[cfg(target_arch = "x86_64")]
table!(AVX2, Avx2Bytes, "avx2,fma", 2, [1 2 3 4]);
table!(PORTABLE, Portable, , 2, [1 2]);

impl Kernels {
    /// The kernels of `level`, or of the fastest slower one that this processor has.
    pub(super) fn of(level: Level) -> &'static Self {
        match level.min(Level::detect()) {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => &AVX512_VNNI,
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => &AVX_VNNI,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &AVX2,
            _ => &PORTABLE,
        }
    }
}

/// `out[m][n] = (starts[m] + sum_k rows[m][k] * panel[n][k]) * (scales[n] * row_scales[m])`.
///
/// # Safety
///
/// The instruction set of `V` is there, and everything [`Tile`] names is good for `M` rows, `N` vectors of columns and
/// `quads` quads.
#[inline(always)]
unsafe fn tile<V: Bytes, const M: usize, const N: usize>(at: &Tile) {
    // SAFETY: all indices stay inside what the caller describes.
    unsafe {
        let mut sums = [[V::splat(0); N]; M];
        for m in 0..M {
            sums[m] = [V::splat(*at.starts.add(m)); N];
        }
        let (mut panel, mut rows) = (at.panel, at.rows);
        for _ in 0..at.quads {
            let weights: [V; N] = std::array::from_fn(|n| V::load(panel.add(n * 4 * V::LANES)));
            for m in 0..M {
                let quad = V::splat(rows.add(m * at.stride).cast::<i32>().read_unaligned());
                for n in 0..N {
                    sums[m][n] = sums[m][n].add_products(weights[n], quad);
                }
            }
            panel = panel.add(N * 4 * V::LANES);
            rows = rows.add(4);
        }
        for m in 0..M {
            for n in 0..N {
                let (scales, out) = (at.scales.add(n * V::LANES), at.out.add(m * at.out_stride + n * V::LANES));
                sums[m][n].store_scaled(scales, *at.row_scales.add(m), out);
            }
        }
    }
}

/// Rows of the weight, `inner` long and at most as many as `panel` has columns, as unsigned bytes: quad by quad, those of
/// all columns. What is missing is as good as zeros.
///
/// # Safety
///
/// The instruction set of `V` is there.
#[inline(always)]
unsafe fn pack<V: Bytes, const N: usize>(weight: &[i8], inner: usize, panel: &mut [i8]) {
    let to_stride = N * 4 * V::LANES;
    let quads = inner.div_ceil(4);
    assert_eq!(panel.len(), quads * to_stride, "bytes of a panel");
    let columns = weight.len() / inner;
    // Whole blocks of LANES columns and LANES quads; the rest quad by quad.
    let blocks = if inner.is_multiple_of(4) { [columns / V::LANES, quads / V::LANES] } else { [0; 2] };
    for column in (0..blocks[0] * V::LANES).step_by(V::LANES) {
        for quad in (0..blocks[1] * V::LANES).step_by(V::LANES) {
            // SAFETY: the block is inside the weight and inside the panel, as the numbers of blocks say.
            unsafe {
                let from = weight.as_ptr().add(column * inner + 4 * quad);
                V::transpose(from, inner, panel.as_mut_ptr().add(quad * to_stride + 4 * column), to_stride);
            }
        }
    }
    for (column, row) in weight.chunks_exact(inner).enumerate() {
        let done = if column < blocks[0] * V::LANES { blocks[1] * V::LANES } else { 0 };
        for (quad, from) in row.chunks(4).enumerate().skip(done) {
            panel[quad * to_stride + 4 * column..][..from.len()].copy_from_slice(from);
        }
    }
    for byte in panel {
        *byte ^= -128;
    }
}

/// Sums of products of `ROWS` rows of activations with the weight rows at `places`.
///
/// # Safety
///
/// The instruction set of `V` is there; `rows` are `ROWS` rows of whole vectors, `stride` apart and with zeros from `inner`
/// on; `starts` are as many, and `weight` is good for `inner` bytes from every place on.
#[inline(always)]
unsafe fn dots<V: Bytes, const ROWS: usize>(
    rows: *const i8,
    stride: usize,
    starts: *const i32,
    weight: *const i8,
    places: &[usize; SIDE_BY_SIDE],
    inner: usize,
    sums: &mut Sums,
) {
    let width = 4 * V::LANES;
    let whole = inner / width * width;
    // SAFETY: whole vectors below `inner`; the rest of the weight goes through a vector of its own.
    unsafe {
        let mut lanes = [[V::splat(0); SIDE_BY_SIDE]; ROWS];
        for i in (0..whole).step_by(width) {
            for w in 0..SIDE_BY_SIDE {
                let weight = weight.add(places[w] + i);
                prefetch(weight.wrapping_add(AHEAD));
                add::<V, ROWS>(&mut lanes, w, rows.add(i), stride, weight);
            }
        }
        if whole < inner {
            for w in 0..SIDE_BY_SIDE {
                let mut rest = [0_i8; 64];
                std::ptr::copy_nonoverlapping(weight.add(places[w] + whole), rest.as_mut_ptr(), inner - whole);
                add::<V, ROWS>(&mut lanes, w, rows.add(whole), stride, rest.as_ptr());
            }
        }
        for (row, lanes) in lanes.iter().enumerate() {
            for w in 0..SIDE_BY_SIDE {
                sums[row][w] = (*starts.add(row)).wrapping_add(lanes[w].total());
            }
        }
    }
}

/// Adds the products of a vector of weight row `w` with `ROWS` rows of activations.
///
/// # Safety
///
/// The instruction set of `V` is there; behind all pointers is a vector.
#[inline(always)]
unsafe fn add<V: Bytes, const ROWS: usize>(
    lanes: &mut [[V; SIDE_BY_SIDE]; ROWS],
    w: usize,
    rows: *const i8,
    stride: usize,
    weight: *const i8,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let weight = V::load(weight).plus_128();
        for row in 0..ROWS {
            lanes[row][w] = lanes[row][w].add_products(weight, V::load(rows.add(row * stride)));
        }
    }
}
