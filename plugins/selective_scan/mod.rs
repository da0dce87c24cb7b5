//! The recurrence of a selective state space model: `ai.accordion::SelectiveScan` on the CPU. See `contract.md`.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

mod operator;
#[cfg(test)]
mod tests;

pub use operator::SelectiveScan;

use std::f32::consts::LOG2_E;

use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, Simd};

/// Channels of one task: with 16 state variables each, their state stays in the first-level cache, and a row of them is
/// long enough to be worth the memory page it lies in.
const CHANNELS: usize = 64;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelectiveScanError {
    /// A tensor has another size than the others ask for.
    #[error("{what} has {found} elements, expected {expected}")]
    Length {
        /// Which one.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// What the dimensions say.
        expected: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Sequences, each with a state of its own \[S\].
    pub segments: usize,
    /// Steps of each \[W\].
    pub window: usize,
    /// Channels \[D\].
    pub channels: usize,
    /// State variables of a channel \[N\].
    pub states: usize,
}

/// The tensors of a call, in the contract's words.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[S, W, D]`.
    pub u: &'a [f32],
    /// `[S, W, D]`.
    pub dt: &'a [f32],
    /// `[D, N]`.
    pub a: &'a [f32],
    /// `[S, W, N]`.
    pub b: &'a [f32],
    /// `[S, W, N]`.
    pub c: &'a [f32],
    /// `[D]`.
    pub skip: &'a [f32],
}

/// `y[t, d] = sum_n state[d, n] c[t, n] + skip[d] u[t, d]` with `state[d, n] = exp(dt[t, d] a[d, n]) state[d, n] + dt[t, d]
/// b[t, n] u[t, d]`, zero before every segment; `output` is `[S, W, D]`.
///
/// # Errors
///
/// The lengths do not fit, or threads could not be had.
pub fn selective_scan(
    sizes: Sizes,
    inputs: &Inputs<'_>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), SelectiveScanError> {
    selective_scan_at(Level::detect(), sizes, inputs, output, threads)
}

fn selective_scan_at(
    level: Level,
    sizes: Sizes,
    inputs: &Inputs<'_>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), SelectiveScanError> {
    let Sizes { segments, window, channels, states } = sizes;
    let rows = segments.saturating_mul(window);
    let lengths = [
        ("u", inputs.u.len(), rows.saturating_mul(channels)),
        ("dt", inputs.dt.len(), rows.saturating_mul(channels)),
        ("A", inputs.a.len(), channels.saturating_mul(states)),
        ("B", inputs.b.len(), rows.saturating_mul(states)),
        ("C", inputs.c.len(), rows.saturating_mul(states)),
        ("skip", inputs.skip.len(), channels),
        ("the output", output.len(), rows.saturating_mul(channels)),
    ];
    if let Some(&(what, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
        return Err(SelectiveScanError::Length { what, found, expected });
    }
    if output.is_empty() {
        return Ok(());
    }
    let kernel = kernel(level);
    let blocks = channels.div_ceil(CHANNELS);
    let output = SharedSlice::new(output);
    threads.run(segments * blocks, &|task| {
        let (segment, first) = (task / blocks, task % blocks * CHANNELS);
        let count = CHANNELS.min(channels - first);
        let (wide, narrow) = (segment * window * channels + first, segment * window * states);
        let mut block = Block {
            decay: vec![0.0; states * CHANNELS],
            state: vec![0.0; states * CHANNELS],
            skip: [0.0; CHANNELS],
            window,
            channels,
            count,
            states,
            u: inputs.u[wide..].as_ptr(),
            dt: inputs.dt[wide..].as_ptr(),
            b: inputs.b[narrow..].as_ptr(),
            c: inputs.c[narrow..].as_ptr(),
        };
        block.skip[..count].copy_from_slice(&inputs.skip[first..first + count]);
        for channel in 0..count {
            for (n, a) in inputs.a[(first + channel) * states..][..states].iter().enumerate() {
                block.decay[n * CHANNELS + channel] = a * LOG2_E;
            }
        }
        let row = |t: usize| {
            // SAFETY: every task has its own segment or its own channels of it.
            unsafe { output.piece(wide + t * channels, count) }
        };
        // SAFETY: `kernel` chose an instruction set of this processor; the pointers are good for `window` rows of
        // `channels` (less those before `first`) and of `states` elements, by the lengths checked above.
        unsafe { kernel(&mut block, &row) };
    })?;
    Ok(())
}

/// The channels of one task. What belongs to a channel and a state variable lies by state variable, [`CHANNELS`] apart.
struct Block {
    /// `a`, for powers of two.
    decay: Vec<f32>,
    state: Vec<f32>,
    skip: [f32; CHANNELS],
    window: usize,
    /// From one row to the next.
    channels: usize,
    /// Of this task.
    count: usize,
    states: usize,
    u: *const f32,
    dt: *const f32,
    b: *const f32,
    c: *const f32,
}

/// The output's row of a step.
type Row<'a> = &'a dyn Fn(usize) -> &'a mut [f32];
type Kernel = unsafe fn(&mut Block, Row<'_>);

/// The kernel of `level`, or of the widest narrower one that this processor has.
fn kernel(level: Level) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn avx512(block: &mut Block, row: Row<'_>) {
        // SAFETY: passed on from the caller.
        unsafe { scan::<Avx512>(block, row) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(block: &mut Block, row: Row<'_>) {
        // SAFETY: passed on from the caller.
        unsafe { scan::<Avx2>(block, row) }
    }
    match level.min(Level::detect()) {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2,
        _ => scan::<Portable>,
    }
}

/// # Safety
///
/// The instruction set of `V` is there, and the block's pointers are good for its rows.
#[inline(always)]
unsafe fn scan<V: Simd>(block: &mut Block, row: Row<'_>) {
    let whole = block.count / V::LANES * V::LANES;
    let rest = block.count - whole;
    for t in 0..block.window {
        let out = row(t);
        // SAFETY: whole vectors below `count`; the channels that are left go through vectors of their own, and what lies
        // behind them in `decay`, `state` and `skip` is zeros.
        unsafe {
            let (u, dt) = (block.u.add(t * block.channels), block.dt.add(t * block.channels));
            for channel in (0..whole).step_by(V::LANES) {
                let y = step(block, t, channel, V::load(u.add(channel)), V::load(dt.add(channel)));
                y.store(out.as_mut_ptr().add(channel));
            }
            if rest > 0 {
                let mut spare = [[0.0f32; 16]; 3];
                std::ptr::copy_nonoverlapping(u.add(whole), spare[0].as_mut_ptr(), rest);
                std::ptr::copy_nonoverlapping(dt.add(whole), spare[1].as_mut_ptr(), rest);
                let y = step(block, t, whole, V::load(spare[0].as_ptr()), V::load(spare[1].as_ptr()));
                y.store(spare[2].as_mut_ptr());
                out[whole..].copy_from_slice(&spare[2][..rest]);
            }
        }
    }
}

/// Step `t` of the channels from `channel` on, as many as a vector has.
///
/// # Safety
///
/// The instruction set of `V` is there, and `channel` is a multiple of its lanes below [`CHANNELS`].
#[inline(always)]
unsafe fn step<V: Simd>(block: &mut Block, t: usize, channel: usize, u: V, dt: V) -> V {
    // SAFETY: every state variable has `CHANNELS` elements, and `b` and `c` a row of `states` for every step.
    unsafe {
        let drive = dt.mul(u);
        let (b, c) = (block.b.add(t * block.states), block.c.add(t * block.states));
        let mut y = V::load(block.skip.as_ptr().add(channel)).mul(u);
        for n in 0..block.states {
            let place = n * CHANNELS + channel;
            let decay = V::load(block.decay.as_ptr().add(place)).mul(dt).exp2();
            let state = block.state.as_mut_ptr().add(place);
            let next = decay.mul_add(V::load(state), drive.mul(V::splat(*b.add(n))));
            next.store(state);
            y = next.mul_add(V::splat(*c.add(n)), y);
        }
        y
    }
}
