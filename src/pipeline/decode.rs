//! The decoder: feeds tokens behind a context, whichever method filled the cache.

use super::{ContextState, Engines, Injected, PipelineError};
use crate::runtime::InPlace;
use crate::tensor::Tensor;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;

/// Name of the decoder's graph.
pub const DECODER: &str = "decoder";

/// Where the first token of a continuation is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Continuation {
    /// Behind the last prompt token: `last + 1`, as the authors' `forward` does.
    #[default]
    Next,
    /// On the last prompt token: `last`, as the authors' `generate` does.
    OffByOne,
}

/// The names of all layers' caches in the decoder's graph, made once.
struct CacheNames {
    past: Vec<[String; 2]>,
    present: Vec<[String; 2]>,
}

impl CacheNames {
    fn new(layers: usize) -> Self {
        let names =
            |what: &str| (0..layers).map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}"))).collect();
        Self { past: names("past_key_values"), present: names("present") }
    }
}

/// Keys and values of one sequence.
enum Cache {
    /// With room behind the `length` valid rows: `[1, G, capacity, d]` per layer, appended to in place.
    Reserved { capacity: usize, buffers: Vec<[Vec<f32>; 2]> },
    /// Exactly the rows so far, replaced by longer ones at every step.
    Growing(Vec<[Tensor; 2]>),
}

/// A sequence that is being decoded.
pub struct Sequence {
    groups: usize,
    head_dim: usize,
    cache: Cache,
    length: usize,
    next_position: i64,
    names: CacheNames,
    injected: Option<Injected>,
}

impl Sequence {
    /// An empty sequence for the decoder of `engines`, with room for `capacity` rows.
    ///
    /// # Errors
    ///
    /// The bundle's model is not supported.
    pub fn new(engines: &Engines<'_>, capacity: usize) -> Result<Self, PipelineError> {
        let arch = engines.bundle().architecture();
        let cache = match engines.bundle().manifest().target {
            Target::OrtCpu => Cache::Reserved { capacity, buffers: reserve(arch, capacity) },
            Target::Portable => {
                let empty = || Tensor::from_f32([1, arch.num_kv_heads(), 0, arch.head_dim()], Vec::new());
                Cache::Growing(
                    (0..arch.num_layers()).map(|_| Ok([empty()?, empty()?])).collect::<Result<_, PipelineError>>()?,
                )
            }
        };
        Ok(Self {
            groups: arch.num_kv_heads(),
            head_dim: arch.head_dim(),
            cache,
            length: 0,
            next_position: 0,
            names: CacheNames::new(arch.num_layers()),
            injected: None,
        })
    }

    /// An empty sequence whose bottom layers attend to `injected`, with room for `capacity` rows.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn over(engines: &Engines<'_>, injected: Injected, capacity: usize) -> Result<Self, PipelineError> {
        Ok(Self { injected: Some(injected), ..Self::new(engines, capacity)? })
    }

    /// A continuation of `state` with room for `extra` more rows. The state is copied, not changed.
    ///
    /// # Errors
    ///
    /// The state does not fit the bundle's model.
    pub fn continue_from(
        engines: &Engines<'_>,
        state: &ContextState,
        extra: usize,
        continuation: Continuation,
    ) -> Result<Self, PipelineError> {
        let mut sequence = Self::new(engines, state.len() + extra)?;
        sequence.length = state.len();
        sequence.injected.clone_from(&state.injected);
        sequence.next_position = state.last_position + i64::from(continuation == Continuation::Next);
        match &mut sequence.cache {
            Cache::Growing(cache) => cache.clone_from(&state.cache),
            Cache::Reserved { capacity, buffers } => {
                let (from, to) = (state.len() * sequence.head_dim, *capacity * sequence.head_dim);
                for (buffer, tensor) in buffers.iter_mut().flatten().zip(state.cache.iter().flatten()) {
                    let heads = tensor.as_f32()?.chunks_exact(from.max(1));
                    for (to, from) in buffer.chunks_exact_mut(to.max(1)).zip(heads) {
                        to[..from.len()].copy_from_slice(from);
                    }
                }
            }
        }
        Ok(sequence)
    }

    /// Rows in the cache.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no row is in the cache.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Position id of the next token.
    pub fn next_position(&self) -> i64 {
        self.next_position
    }

    /// Feeds `ids` and returns the logits `[rows, V]` of the last `rows` of them.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary, or the decoder fails.
    pub fn forward(&mut self, engines: &mut Engines<'_>, ids: &[u32], rows: usize) -> Result<Tensor, PipelineError> {
        Ok(self.forward_tapped(engines, ids, rows, &[])?.0)
    }

    /// As [`Self::forward`], also returning the decoder's values `taps`.
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_tapped(
        &mut self,
        engines: &mut Engines<'_>,
        ids: &[u32],
        rows: usize,
        taps: &[&str],
    ) -> Result<(Tensor, Vec<Tensor>), PipelineError> {
        let arch = engines.bundle().architecture();
        let new = ids.len();
        if let Some(window) = arch.sliding_window().filter(|&window| self.length + new > window) {
            return Err(PipelineError::SlidingWindow { length: self.length + new, window });
        }
        self.make_room(new);
        let input_ids = token_tensor(ids, arch.vocab_size())?;
        let positions: Vec<i64> = (self.next_position..).take(new).collect();
        let positions = Tensor::from_i64([1, new], positions)?;
        let keep = Tensor::from_i64([1], vec![rows as i64])?;
        let past_length = Tensor::from_i64([1], vec![self.length as i64])?;
        let engine = engines.get(DECODER, taps)?;
        let mut inputs = vec![("input_ids", &input_ids), ("position_ids", &positions), ("num_logits_to_keep", &keep)];
        let injected_names: Vec<[String; 2]> = self
            .injected
            .iter()
            .flat_map(|injected| {
                (0..injected.layers.len()).map(|l| ["key", "value"].map(|part| format!("injected.{l}.{part}")))
            })
            .collect();
        for ([key_name, value_name], layer) in injected_names.iter().zip(self.injected.iter().flat_map(|i| &i.layers)) {
            let key = if new == 1 { layer.single_key.as_ref().unwrap_or(&layer.key) } else { &layer.key };
            inputs.extend([(key_name.as_str(), key), (value_name.as_str(), &layer.value)]);
        }
        let mut outputs = vec!["logits"];
        outputs.extend(taps);
        let mut results = match &mut self.cache {
            Cache::Reserved { capacity, buffers } => {
                inputs.push(("past_length", &past_length));
                let shape = [1, self.groups, *capacity, self.head_dim];
                let names = self.names.past.iter().flatten().zip(self.names.present.iter().flatten());
                let mut in_place: Vec<InPlace<'_>> = names
                    .zip(buffers.iter_mut().flatten())
                    .map(|((input, output), data)| InPlace { input, output, shape: &shape, data })
                    .collect();
                engine.run(&inputs, &mut in_place, &outputs)?
            }
            Cache::Growing(cache) => {
                inputs.extend(self.names.past.iter().flatten().map(String::as_str).zip(cache.iter().flatten()));
                outputs.extend(self.names.present.iter().flatten().map(String::as_str));
                let mut results = engine.run(&inputs, &mut [], &outputs)?;
                let present = results.split_off(1 + taps.len());
                *cache = present.chunks_exact(2).map(|pair| [pair[0].clone(), pair[1].clone()]).collect();
                results
            }
        };
        self.length += new;
        self.next_position += new as i64;
        let tapped = results.split_off(1);
        let logits = results.swap_remove(0);
        Ok((logits.rows(0..1).reshaped(&logits.shape()[1..])?, tapped))
    }

    /// Grows the reserved cache, at least by half, when `new` rows do not fit.
    fn make_room(&mut self, new: usize) {
        let Cache::Reserved { capacity, buffers } = &mut self.cache else { return };
        let needed = self.length + new;
        if needed <= *capacity {
            return;
        }
        let larger = needed.max(*capacity + *capacity / 2);
        let (valid, old, width) = (self.length * self.head_dim, *capacity * self.head_dim, larger * self.head_dim);
        for buffer in buffers.iter_mut().flatten() {
            let mut grown = vec![0.0; self.groups * width];
            for (to, from) in grown.chunks_exact_mut(width).zip(buffer.chunks_exact(old.max(1))) {
                to[..valid].copy_from_slice(&from[..valid]);
            }
            *buffer = grown;
        }
        *capacity = larger;
    }

    /// The rows so far as a state that other sequences can continue from; `logits` are those of the last row.
    ///
    /// # Errors
    ///
    /// Never for a sequence that was fed.
    pub fn into_state(self, logits: Vec<f32>) -> Result<ContextState, PipelineError> {
        let shape = [1, self.groups, self.length, self.head_dim];
        let cache = match self.cache {
            Cache::Growing(cache) => cache,
            Cache::Reserved { capacity, buffers } => {
                let (valid, width) = (self.length * self.head_dim, capacity * self.head_dim);
                let exact = |mut buffer: Vec<f32>| {
                    // Rows of a head move down to where the head before them ends.
                    for head in 1..self.groups {
                        buffer.copy_within(head * width..head * width + valid, head * valid);
                    }
                    buffer.truncate(self.groups * valid);
                    Tensor::from_f32(shape, buffer)
                };
                let pairs = buffers.into_iter().map(|[k, v]| Ok([exact(k)?, exact(v)?]));
                pairs.collect::<Result<_, PipelineError>>()?
            }
        };
        let position_ids = (self.next_position - self.length as i64..self.next_position).collect();
        Ok(ContextState { cache, position_ids, last_position: self.next_position - 1, logits, injected: self.injected })
    }

    /// The keys and values so far, `[1, G, length, d]` per layer.
    ///
    /// # Errors
    ///
    /// Never for a sequence that was fed.
    pub fn cache(&self) -> Result<Vec<[Tensor; 2]>, PipelineError> {
        match &self.cache {
            Cache::Growing(cache) => Ok(cache.clone()),
            Cache::Reserved { capacity, buffers } => {
                let (valid, width) = (self.length * self.head_dim, capacity * self.head_dim);
                let exact = |buffer: &Vec<f32>| {
                    let rows = buffer.chunks_exact(width.max(1)).flat_map(|head| &head[..valid]).copied().collect();
                    Tensor::from_f32([1, self.groups, self.length, self.head_dim], rows)
                };
                buffers.iter().map(|[k, v]| Ok([exact(k)?, exact(v)?])).collect()
            }
        }
    }
}

fn reserve(arch: &Architecture, capacity: usize) -> Vec<[Vec<f32>; 2]> {
    let elements = arch.num_kv_heads() * capacity * arch.head_dim();
    (0..arch.num_layers()).map(|_| [vec![0.0; elements], vec![0.0; elements]]).collect()
}

/// Token ids as an input `[1, ids]`.
pub(super) fn token_tensor(ids: &[u32], vocab_size: usize) -> Result<Tensor, PipelineError> {
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(PipelineError::TokenId { id, vocab_size });
    }
    Ok(Tensor::from_i64([1, ids.len()], ids.iter().map(|&id| i64::from(id)).collect())?)
}
