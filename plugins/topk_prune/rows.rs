//! Copying rows that lie apart. Each is a few cache lines, too short for the processor to see where the next one is, and
//! what is written is rarely read before it has left the caches: so rows to come are asked for in time, and large outputs
//! are written past the caches.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, Simd, prefetch};

/// Elements between a row that is copied and the one that is asked for.
const AHEAD: usize = 1024;

/// Bytes of an output from which on it is written past the caches: more than a second-level cache holds.
const STREAM_FROM: usize = 4 << 20;

/// Elements of a cache line.
const LINE: usize = 16;

/// How rows are gathered from planes of one shape.
pub(super) struct Rows {
    kernel: Kernel,
    length: usize,
    width: usize,
    stream: bool,
}

/// Source, rows per plane, elements per row, destination, planes, whether it is streamed to; the rows are the same in every
/// plane.
type Kernel = unsafe fn(*const f32, usize, &[i64], usize, *mut f32, usize, bool);

impl Rows {
    /// Rows of planes of `[length, width]`, for an output of `bytes` in all.
    pub(super) fn new(level: Level, length: usize, width: usize, bytes: usize) -> Self {
        let stream = bytes >= STREAM_FROM && width.is_multiple_of(LINE);
        Self { kernel: kernel(level, width), length, width, stream }
    }

    /// Copies the rows `rows` of every plane of `from` to `to`, one after the other.
    ///
    /// # Safety
    ///
    /// The planes have all of the rows, and `to` has room for all of them from every plane.
    pub(super) unsafe fn copy(&self, from: &[f32], rows: &[i64], to: &mut [f32]) {
        let Self { kernel, length, width, stream } = *self;
        let planes = from.len().checked_div(length * width).unwrap_or(0);
        debug_assert_eq!(to.len(), planes * rows.len() * width);
        debug_assert!(rows.iter().all(|&row| (row as usize) < length));
        let stream = stream && to.as_ptr().addr().is_multiple_of(LINE * size_of::<f32>());
        // SAFETY: `kernel` is for this width and an instruction set of this processor; the rest is the caller's promise.
        unsafe { kernel(from.as_ptr(), length, rows, width, to.as_mut_ptr(), planes, stream) }
    }
}

/// The kernel of `level`, or of the widest narrower one that this processor has. The usual head dimensions have their own.
fn kernel(level: Level, width: usize) -> Kernel {
    macro_rules! instance {
        ($($features:literal)?, $vector:ty) => {{
            $(#[target_feature(enable = $features)])?
            unsafe fn instance<const WIDTH: usize>(
                from: *const f32,
                length: usize,
                rows: &[i64],
                width: usize,
                to: *mut f32,
                planes: usize,
                stream: bool,
            ) {
                let width = if WIDTH == 0 { width } else { WIDTH };
                // SAFETY: passed on from the caller.
                unsafe {
                    if stream {
                        all::<$vector, true>(from, length, rows, width, to, planes);
                    } else {
                        all::<$vector, false>(from, length, rows, width, to, planes);
                    }
                }
            }
            match width {
                64 => instance::<64>,
                128 => instance::<128>,
                _ => instance::<0>,
            }
        }};
    }
    match level.min(Level::detect()) {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => instance!("avx512f,avx512dq", Avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => instance!("avx2,fma", Avx2),
        _ => instance!(, Portable),
    }
}

/// # Safety
///
/// The instruction set of `V` is there, all planes have the rows, and `to` has room for them. If it is streamed to, it is
/// aligned to a cache line and the width a multiple of one.
#[inline(always)]
unsafe fn all<V: Simd, const STREAM: bool>(
    from: *const f32,
    length: usize,
    rows: &[i64],
    width: usize,
    to: *mut f32,
    planes: usize,
) {
    let whole = width / LINE * LINE;
    let ahead = AHEAD.div_ceil(width.max(1));
    for plane in 0..planes {
        for (i, &row) in rows.iter().enumerate() {
            let next = *rows.get(i + ahead).unwrap_or(&row);
            // SAFETY: whole lines inside rows that are there, and then what is left of the row.
            unsafe {
                let (next, from) = (
                    from.add((plane * length + next as usize) * width),
                    from.add((plane * length + row as usize) * width),
                );
                let to = to.add((plane * rows.len() + i) * width);
                for line in (0..whole).step_by(LINE) {
                    prefetch(next.wrapping_add(line));
                    for at in (line..line + LINE).step_by(V::LANES) {
                        let vector = V::load(from.add(at));
                        if STREAM { vector.stream(to.add(at)) } else { vector.store(to.add(at)) }
                    }
                }
                if whole < width {
                    std::ptr::copy_nonoverlapping(from.add(whole), to.add(whole), width - whole);
                }
            }
        }
    }
    if STREAM {
        // SAFETY: the instruction set is there.
        unsafe { V::fence() };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn rows_are_copied_at_every_level_streamed_or_not() {
        let (length, planes) = (70, 3);
        let rows: Vec<i64> = (0..length as i64).filter(|row| row % 3 != 1 && row % 7 != 0).collect();
        for width in [1, 16, 20, 33, 64, 80, 128] {
            let from: Vec<f32> = (0..planes * length * width).map(|i| i as f32).collect();
            let row = |plane: usize, row: i64| &from[(plane * length + row as usize) * width..][..width];
            let expected: Vec<f32> =
                (0..planes).flat_map(|plane| rows.iter().flat_map(move |&r| row(plane, r))).copied().collect();
            for level in Level::available() {
                // Aligned and not, large and not.
                for (skew, bytes) in [(0, usize::MAX), (1, usize::MAX), (0, 0)] {
                    let mut scratch = Scratch::default();
                    let out = &mut scratch.zeroed(expected.len() + skew + 1)[skew..];
                    let (out, behind) = out.split_at_mut(expected.len());
                    // SAFETY: the planes have the rows, and the output is as large as what is expected.
                    unsafe { Rows::new(level, length, width, bytes).copy(&from, &rows, out) };
                    assert_eq!(out, expected, "{level:?}, width {width}, {skew} from a line, {bytes} bytes");
                    assert_eq!(behind[0], 0.0, "{level:?}, width {width}: written behind the end");
                }
            }
        }
    }
}
