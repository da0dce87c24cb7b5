//! Many rows of queries, as in reading a prompt: the cache of one head at a time is made floats, which so many rows read that it
//! costs little.

use super::Caches;
use crate::attention::{self, AttentionError, Geometry, Inputs, Outputs, Past};
use crate::parallel::ParallelFor;

/// Attends all rows of `query [B, T, H d]` to the caches, which are complete.
///
/// # Errors
///
/// Threads could not be had.
pub(super) fn attend(
    geometry: &Geometry,
    caches: &Caches<'_>,
    query: &[f32],
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    let Geometry { batch, rows, heads, kv_heads, head_dim, past, capacity } = *geometry;
    let (group, total) = (geometry.group(), past + rows);
    let one = Geometry { batch: 1, heads: group, kv_heads: 1, capacity: total, ..*geometry };
    let width = group * head_dim;
    let (mut queries, mut mixed) = (vec![0.0; rows * width], vec![0.0; rows * width]);
    let (mut keys, mut values) = (vec![0.0; total * head_dim], vec![0.0; total * head_dim]);
    for head in 0..batch * kv_heads {
        let place = |t: usize| ((head / kv_heads * rows + t) * heads + head % kv_heads * group) * head_dim;
        for (t, to) in queries.chunks_exact_mut(width).enumerate() {
            to.copy_from_slice(&query[place(t)..][..width]);
        }
        let stretch = head * capacity * head_dim..(head * capacity + total) * head_dim;
        let channels = head * head_dim..(head + 1) * head_dim;
        expand(&caches.key[stretch.clone()], &caches.key_scale[channels.clone()], &mut keys);
        expand(&caches.value[stretch], &caches.value_scale[channels], &mut values);
        let [key, value] = [&keys, &values].map(|all| all[past * head_dim..].to_vec());
        let scale = 1.0 / (head_dim as f32).sqrt();
        attention::attend(
            &one,
            &Inputs { query: &queries, key: &key, value: &value, past: Past::InPlace, scale },
            Outputs { output: &mut mixed, present_key: &mut keys, present_value: &mut values },
            threads,
        )?;
        for (t, from) in mixed.chunks_exact(width).enumerate() {
            output[place(t)..][..width].copy_from_slice(from);
        }
    }
    Ok(())
}

/// What `entries [rows, d]` in units of `scale [d]` stand for.
fn expand(entries: &[i8], scale: &[f32], to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(scale.len()).zip(entries.chunks_exact(scale.len())) {
        for ((to, &entry), scale) in to.iter_mut().zip(from).zip(scale) {
            *to = f32::from(entry) * scale;
        }
    }
}
