//! Keys and values with room behind them, which graphs append to in place.

use crate::runtime::Memory;
use crate::tensor::{Tensor, TensorError};

/// What a cache may hold.
pub(super) trait Element: Copy + Default {
    /// The elements of `tensor`.
    fn of(tensor: &Tensor) -> Result<&[Self], TensorError>;
    /// A tensor of them.
    fn tensor(shape: [usize; 4], elements: Vec<Self>) -> Result<Tensor, TensorError>;
    /// Them, for a graph to update.
    fn memory(elements: &mut [Self]) -> Memory<'_>;
}

impl Element for f32 {
    fn of(tensor: &Tensor) -> Result<&[Self], TensorError> {
        tensor.as_f32()
    }

    fn tensor(shape: [usize; 4], elements: Vec<Self>) -> Result<Tensor, TensorError> {
        Tensor::from_f32(shape, elements)
    }

    fn memory(elements: &mut [Self]) -> Memory<'_> {
        Memory::F32(elements)
    }
}

impl Element for i8 {
    fn of(tensor: &Tensor) -> Result<&[Self], TensorError> {
        tensor.as_i8()
    }

    fn tensor(shape: [usize; 4], elements: Vec<Self>) -> Result<Tensor, TensorError> {
        Tensor::from_i8(shape, elements)
    }

    fn memory(elements: &mut [Self]) -> Memory<'_> {
        Memory::I8(elements)
    }
}

/// Keys and values `[1, G, capacity, d]` of every layer, of whose rows the first ones are valid.
pub(super) struct Reserved<T> {
    groups: usize,
    head_dim: usize,
    capacity: usize,
    layers: Vec<[Vec<T>; 2]>,
}

impl<T: Element> Reserved<T> {
    /// Room for `capacity` rows.
    pub(super) fn new(layers: usize, [groups, capacity, head_dim]: [usize; 3]) -> Self {
        let room = || vec![T::default(); groups * capacity * head_dim];
        Self { groups, head_dim, capacity, layers: (0..layers).map(|_| [room(), room()]).collect() }
    }

    /// Dimensions of keys and of values.
    pub(super) fn shape(&self) -> [usize; 4] {
        [1, self.groups, self.capacity, self.head_dim]
    }

    /// Keys and values in turn, layer by layer, for a graph to update.
    pub(super) fn memory(&mut self) -> impl Iterator<Item = Memory<'_>> {
        self.layers.iter_mut().flatten().map(|buffer| T::memory(buffer))
    }

    /// Writes `count` rows of `tensors`, keys and values in turn, `[1, G, count, d]`, to the layers from `first` on, behind
    /// `length` rows.
    pub(super) fn put<'t>(
        &mut self,
        first: usize,
        tensors: impl IntoIterator<Item = &'t Tensor>,
        length: usize,
        count: usize,
    ) -> Result<(), TensorError> {
        let (stride, offset, count) = (self.capacity * self.head_dim, length * self.head_dim, count * self.head_dim);
        for (buffer, tensor) in self.layers[first..].iter_mut().flatten().zip(tensors) {
            put(buffer, stride, offset, T::of(tensor)?, count);
        }
        Ok(())
    }

    /// Grows the room, at least by half, where `new` rows do not fit behind `length`.
    pub(super) fn make_room(&mut self, length: usize, new: usize) {
        let needed = length + new;
        if needed <= self.capacity {
            return;
        }
        let larger = needed.max(self.capacity + self.capacity / 2);
        let (valid, old, stride) = (length * self.head_dim, self.capacity * self.head_dim, larger * self.head_dim);
        for buffer in self.layers.iter_mut().flatten() {
            let mut grown = vec![T::default(); self.groups * stride];
            for (to, from) in grown.chunks_exact_mut(stride).zip(buffer.chunks_exact(old.max(1))) {
                to[..valid].copy_from_slice(&from[..valid]);
            }
            *buffer = grown;
        }
        self.capacity = larger;
    }

    /// The first `length` rows, `[1, G, length, d]` per layer.
    pub(super) fn tensors(&self, length: usize) -> Result<Vec<[Tensor; 2]>, TensorError> {
        let shape = [1, self.groups, length, self.head_dim];
        let (valid, stride) = (length * self.head_dim, self.capacity * self.head_dim);
        let exact = |buffer: &Vec<T>| {
            let rows = buffer.chunks_exact(stride.max(1)).flat_map(|head| &head[..valid]).copied().collect();
            T::tensor(shape, rows)
        };
        self.layers.iter().map(|[k, v]| Ok([exact(k)?, exact(v)?])).collect()
    }

    /// As [`Self::tensors`], in the same memory.
    pub(super) fn into_tensors(self, length: usize) -> Result<Vec<[Tensor; 2]>, TensorError> {
        let shape = [1, self.groups, length, self.head_dim];
        let (valid, stride) = (length * self.head_dim, self.capacity * self.head_dim);
        let exact = |mut buffer: Vec<T>| {
            // Rows of a head move down to where the head before them ends.
            for head in 1..self.groups {
                buffer.copy_within(head * stride..head * stride + valid, head * valid);
            }
            buffer.truncate(self.groups * valid);
            T::tensor(shape, buffer)
        };
        self.layers.into_iter().map(|[k, v]| Ok([exact(k)?, exact(v)?])).collect()
    }
}

/// Copies every head of `from`, `count` elements each, to the place `offset` in the head of `to` that has the same number;
/// heads of `to` are `stride` elements apart.
fn put<T: Copy>(to: &mut [T], stride: usize, offset: usize, from: &[T], count: usize) {
    for (to, from) in to.chunks_exact_mut(stride.max(1)).zip(from.chunks_exact(count.max(1))) {
        to[offset..offset + count].copy_from_slice(&from[..count]);
    }
}
