//! Working memory aligned to cache lines, so that no vector access straddles two.

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A growing buffer of `f32` whose contents are whatever was last written.
#[derive(Default)]
pub(crate) struct Scratch(Vec<Line>);

impl Scratch {
    /// The whole buffer, grown to at least `len` elements.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        self.get_mut()
    }

    /// At least `len` elements, all zero.
    pub(crate) fn zeroed(&mut self, len: usize) -> &mut [f32] {
        let all = self.at_least(len);
        all[..len].fill(0.0);
        all
    }

    /// Everything.
    pub(crate) fn get(&self) -> &[f32] {
        // SAFETY: `Line` is `repr(C)` over sixteen `f32` and exactly as large, so the memory is that many `f32`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }

    /// Everything, to write.
    pub(crate) fn get_mut(&mut self) -> &mut [f32] {
        let lines = self.0.as_mut_slice();
        // SAFETY: `Line` is `repr(C)` over sixteen `f32` and exactly as large, so the memory is that many `f32`.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) }
    }
}
