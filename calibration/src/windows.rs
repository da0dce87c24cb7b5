//! Which parts of a text a calibration reads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ops::Range;

/// Why windows could not be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// A length or a number of windows is zero.
    #[error("calibration needs at least one window of at least one token, not {count} of {window}")]
    Empty {
        /// Tokens per window asked for.
        window: usize,
        /// Windows asked for.
        count: usize,
    },
    /// The windows cannot all start at different tokens.
    #[error("the calibration text has {tokens} tokens, {count} different windows of {window} need at least {needed}")]
    TextTooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens per window asked for.
        window: usize,
        /// Windows asked for.
        count: usize,
        /// Tokens the text would need.
        needed: usize,
    },
}

/// `count` windows of `window` tokens out of a text of `tokens`, in text order; the same for the same arguments on
/// every machine.
///
/// Window `i` starts at `i * stride + offset_i`, with the stride as large as the text allows but not above `window`,
/// and `offset_i` drawn uniformly from the `i`-th of `count` equal parts of what is left (stratified sampling). So the
/// windows are spread over the whole text and do not overlap if it has `count * window` tokens; in a shorter text
/// they overlap evenly.
///
/// # Errors
///
/// An argument is zero, or the text has fewer than `window + count - 1` tokens.
pub fn choose_windows(tokens: usize, window: usize, count: usize, seed: u64) -> Result<Vec<Range<usize>>, WindowError> {
    if window == 0 || count == 0 {
        return Err(WindowError::Empty { window, count });
    }
    let needed = window.checked_add(count - 1);
    if needed.is_none_or(|needed| tokens < needed) {
        return Err(WindowError::TextTooShort { tokens, window, count, needed: needed.unwrap_or(usize::MAX) });
    }
    let last_start = tokens - window;
    let stride = last_start.checked_div(count - 1).map_or(0, |widest| widest.min(window));
    let slack = last_start - stride * (count - 1);
    // The part's bounds are exact in u128, whatever the sizes.
    let part = |i: usize| (i as u128 * (slack as u128 + 1) / count as u128) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let starts = (0..count).map(|i| {
        let width = (part(i + 1) - part(i)).max(1);
        let offset = (u128::from(rng.next_u64()) * width as u128) >> 64;
        i * stride + part(i) + offset as usize
    });
    Ok(starts.map(|start| start..start + window).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn same_seed_same_windows_other_seed_others() {
        let choose = |seed| choose_windows(1_000_000, 2048, 32, seed).unwrap();
        assert_eq!(choose(7), choose(7));
        assert_ne!(choose(7), choose(8));
    }

    #[test]
    fn the_choice_is_pinned() {
        // A table's provenance promises that its seed finds the same windows again: a change here is a change of format.
        let starts: Vec<_> = choose_windows(1000, 100, 4, 1).unwrap().iter().map(|w| w.start).collect();
        assert_eq!(starts, [60, 262, 589, 783]);
    }

    #[test]
    fn refuses_what_cannot_be_had() {
        assert_eq!(choose_windows(100, 0, 3, 0), Err(WindowError::Empty { window: 0, count: 3 }));
        assert_eq!(choose_windows(100, 10, 0, 0), Err(WindowError::Empty { window: 10, count: 0 }));
        let short = choose_windows(101, 100, 3, 0).unwrap_err();
        assert_eq!(short, WindowError::TextTooShort { tokens: 101, window: 100, count: 3, needed: 102 });
        assert!(choose_windows(usize::MAX, usize::MAX, usize::MAX, 0).is_err());
    }

    proptest! {
        #[test]
        fn windows_are_distinct_ordered_inside_and_apart_where_there_is_room(
            window in 1_usize..200, count in 1_usize..40, extra in 0_usize..5000, seed in any::<u64>(),
        ) {
            let tokens = window + count - 1 + extra;
            let chosen = choose_windows(tokens, window, count, seed).unwrap();
            prop_assert_eq!(chosen.len(), count);
            prop_assert!(chosen.iter().all(|w| w.len() == window && w.end <= tokens));
            let room = tokens >= window * count;
            prop_assert!(chosen.windows(2).all(|w| w[0].start < w[1].start && (!room || w[0].end <= w[1].start)));
        }
    }
}
