//! Keys and values of a context in 8 bits, in files and for decoders that keep them so: every channel of every head counts in
//! units of its own, because keys have channels that are large in all rows.

use super::{ContextState, Injected, InjectedLayer, Scales};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::precision::KvCache;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Numbers that a context state is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatePrecision {
    /// As the graphs gave them.
    #[default]
    Fp32,
    /// A quarter of that: keys and values rounded to multiples of the 127th part of their channel's largest magnitude.
    Int8,
}

impl From<StatePrecision> for KvCache {
    fn from(precision: StatePrecision) -> Self {
        match precision {
            StatePrecision::Fp32 => Self::Fp32,
            StatePrecision::Int8 => Self::Int8,
        }
    }
}

/// The largest magnitude of an 8-bit number here: -128 is left out, so that the numbers are symmetric.
const LEVELS: f32 = 127.0;

/// What a channel of zeros, or of no rows, counts in: so little that the first number there decides.
const EMPTY: f32 = 1.0 / (1_u64 << 63) as f32;

impl ContextState {
    /// The state in the numbers of `kv_cache`, which it may be in already.
    ///
    /// # Errors
    ///
    /// A tensor is neither of fp32 nor of 8-bit integers with what they count in.
    pub fn in_numbers(&self, kv_cache: KvCache) -> Result<Cow<'_, Self>, TensorError> {
        if self.scales.is_some() == (kv_cache == KvCache::Int8) {
            return Ok(Cow::Borrowed(self));
        }
        Ok(Cow::Owned(self.clone().into_numbers(kv_cache)?))
    }

    /// As [`Self::in_numbers`], letting go of every tensor as soon as it is converted.
    ///
    /// # Errors
    ///
    /// As [`Self::in_numbers`].
    pub fn into_numbers(self, kv_cache: KvCache) -> Result<Self, TensorError> {
        match (kv_cache, &self.scales) {
            (KvCache::Fp32, None) | (KvCache::Int8, Some(_)) => Ok(self),
            (KvCache::Int8, None) => self.quantized(),
            (KvCache::Fp32, Some(scales)) => {
                let cache = dequantized_layers(&self.cache, &scales.cache)?;
                let layers = self.injected.iter().flat_map(|injected| &injected.layers);
                let scales = scales.injected.iter().flat_map(|injected| &injected.layers);
                let layers = layers.zip(scales).map(|(layer, scale)| {
                    let single = layer.single_key.as_ref().zip(scale.single_key.as_ref());
                    Ok(InjectedLayer {
                        key: dequantized(&layer.key, &scale.key)?,
                        single_key: single.map(|(key, scale)| dequantized(key, scale)).transpose()?,
                        value: dequantized(&layer.value, &scale.value)?,
                    })
                });
                let layers = layers.collect::<Result<Vec<_>, TensorError>>()?;
                let injected = self.injected.is_some().then_some(Injected { layers });
                Ok(Self { cache, injected, scales: None, ..self })
            }
        }
    }

    fn quantized(self) -> Result<Self, TensorError> {
        let mut cache = Vec::with_capacity(self.cache.len());
        let mut scales = Scales { cache: Vec::with_capacity(self.cache.len()), injected: None };
        for [key, value] in self.cache {
            let ([key, key_scale], [value, value_scale]) = (quantized(&key)?, quantized(&value)?);
            cache.push([key, value]);
            scales.cache.push([key_scale, value_scale]);
        }
        let mut injected = None;
        if let Some(Injected { layers }) = self.injected {
            let (mut entries, mut counted) = (Vec::with_capacity(layers.len()), Vec::with_capacity(layers.len()));
            for InjectedLayer { key, single_key, value } in layers {
                let ([key, key_scale], [value, value_scale]) = (quantized(&key)?, quantized(&value)?);
                let single = single_key.map(|key| quantized(&key)).transpose()?;
                let (single_key, single_scale) = single.map(|[entries, scale]| (entries, scale)).unzip();
                entries.push(InjectedLayer { key, single_key, value });
                counted.push(InjectedLayer { key: key_scale, single_key: single_scale, value: value_scale });
            }
            injected = Some(Injected { layers: entries });
            scales.injected = Some(Injected { layers: counted });
        }
        Ok(Self { cache, injected, scales: Some(scales), ..self })
    }
}

/// What 8-bit keys and values stand for, layer by layer.
pub(super) fn dequantized_layers(
    entries: &[[Tensor; 2]],
    scales: &[[Tensor; 2]],
) -> Result<Vec<[Tensor; 2]>, TensorError> {
    let layers = entries.iter().zip(scales);
    layers.map(|([k, v], [k_scale, v_scale])| Ok([dequantized(k, k_scale)?, dequantized(v, v_scale)?])).collect()
}

/// Keys or values `x [1, G, rows, d]` as int8 of the same shape, and what they count in, f32 `[1, G, 1, d]`.
fn quantized(x: &Tensor) -> Result<[Tensor; 2], TensorError> {
    let (numbers, shape) = (x.as_f32()?, x.shape());
    let (plane, width) = plane_and_width(shape);
    let mut entries = vec![0_i8; numbers.len()];
    let heads: usize = shape.iter().rev().skip(2).product();
    let mut scales = Vec::with_capacity(heads * width);
    for head in 0..heads {
        let plane = head * plane..(head + 1) * plane;
        let (numbers, entries) = (&numbers[plane.clone()], &mut entries[plane]);
        let mut scale = vec![0.0_f32; width];
        for row in numbers.chunks_exact(width) {
            scale.iter_mut().zip(row).for_each(|(scale, x)| *scale = scale.max(x.abs()));
        }
        for scale in &mut scale {
            *scale = (*scale / LEVELS).max(EMPTY);
        }
        for (row, entries) in numbers.chunks_exact(width).zip(entries.chunks_exact_mut(width)) {
            for ((entry, x), scale) in entries.iter_mut().zip(row).zip(&scale) {
                *entry = (x / scale).round_ties_even().clamp(-LEVELS, LEVELS) as i8;
            }
        }
        scales.extend(scale);
    }
    let mut scale_shape = shape.to_vec();
    if let Some(rows) = scale_shape.iter_mut().rev().nth(1) {
        *rows = 1;
    }
    Ok([Tensor::from_i8(shape, entries)?, Tensor::from_f32(scale_shape, scales)?])
}

/// What the result of [`quantized`] stands for.
fn dequantized(entries: &Tensor, scales: &Tensor) -> Result<Tensor, TensorError> {
    let (plane, width) = plane_and_width(entries.shape());
    let mut numbers = entries.to_f32();
    for (plane, scale) in numbers.chunks_exact_mut(plane.max(width)).zip(scales.as_f32()?.chunks_exact(width)) {
        for row in plane.chunks_exact_mut(width) {
            row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
        }
    }
    Tensor::from_f32(entries.shape(), numbers)
}

/// Numbers of one head, and of one of its rows.
fn plane_and_width(shape: &[usize]) -> (usize, usize) {
    let width = shape.last().copied().unwrap_or(1).max(1);
    (shape.iter().rev().take(2).product(), width)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::dtype::DType;

    #[test]
    fn every_channel_of_every_head_has_a_scale_of_its_own() {
        let shape = [1, 2, 3, 2];
        // Head by head, row by row: channels of very different sizes, and one of zeros.
        let numbers = vec![100.0, 0.01, -50.0, 0.02, 25.0, -0.03, 1.0, 0.0, 2.0, 0.0, -4.0, 0.0];
        let [entries, scales] = quantized(&Tensor::from_f32(shape, numbers.clone()).unwrap()).unwrap();
        assert_eq!((entries.dtype(), entries.shape(), scales.shape()), (DType::I8, &shape[..], &[1, 2, 1, 2][..]));
        assert_eq!(scales.as_f32().unwrap(), [100.0 / 127.0, 0.03 / 127.0, 4.0 / 127.0, EMPTY]);
        let back = dequantized(&entries, &scales).unwrap();
        for (i, (found, expected)) in back.as_f32().unwrap().iter().zip(&numbers).enumerate() {
            let step = scales.as_f32().unwrap()[i / 6 * 2 + i % 2];
            assert!((found - expected).abs() <= step * 0.5001, "{i}: {found}, {expected}");
        }
        assert_eq!(back.as_f32().unwrap()[0].to_bits(), 100.0_f32.to_bits());
    }

    #[test]
    fn nothing_stays_nothing() {
        let [entries, scales] = quantized(&Tensor::from_f32([1, 2, 0, 4], Vec::new()).unwrap()).unwrap();
        assert_eq!(dequantized(&entries, &scales).unwrap().shape(), [1, 2, 0, 4]);
    }
}
