//! Working memory aligned to cache lines, so that no vector access straddles two.

use std::marker::PhantomData;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A number for which any bits are a value.
///
/// # Safety
///
/// That is so, and its size divides 64.
pub(crate) unsafe trait Number: Copy {}

// SAFETY: all bit patterns are values, of 4, 4 and 1 bytes.
unsafe impl Number for f32 {}
// SAFETY: as above.
unsafe impl Number for i32 {}
// SAFETY: as above.
unsafe impl Number for i8 {}

/// A growing buffer of numbers whose contents are whatever was last written.
pub(crate) struct Scratch<T = f32>(Vec<Line>, PhantomData<T>);

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self(Vec::new(), PhantomData)
    }
}

impl<T: Number> Scratch<T> {
    const PER_LINE: usize = size_of::<Line>() / size_of::<T>();

    /// The whole buffer, grown to at least `len` elements.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [T] {
        let lines = len.div_ceil(Self::PER_LINE);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        self.get_mut()
    }

    /// Everything.
    pub(crate) fn get(&self) -> &[T] {
        // SAFETY: `Line` is as large as that many numbers, aligned for them, and any bytes are numbers.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * Self::PER_LINE) }
    }

    /// Everything, to write.
    pub(crate) fn get_mut(&mut self) -> &mut [T] {
        let lines = self.0.as_mut_slice();
        // SAFETY: `Line` is as large as that many numbers, aligned for them, and any bytes are numbers.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * Self::PER_LINE) }
    }
}

impl Scratch {
    /// At least `len` elements, all zero.
    pub(crate) fn zeroed(&mut self, len: usize) -> &mut [f32] {
        let all = self.at_least(len);
        all[..len].fill(0.0);
        all
    }
}
