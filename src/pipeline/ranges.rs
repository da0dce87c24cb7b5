//! Range calibration: the ranges of activations while a bundle's own pipeline reads windows of ordinary text.

mod layout;

use self::layout::{Layout, RangeObserver};
use super::compress::Compression;
use super::decode::{Continuation, Sequence};
use super::prompt::{PromptIds, leading_ids};
use super::state_file::StateMethod;
use super::{Engines, PipelineError};
use crate::bundle::{Bundle, Method};
use crate::checkpoint::{CheckpointError, Tokenizer};
use crate::runtime::Loader;
use accordion_calibration::ranges::{EstimateError, RangeEstimator, RangeTable};
use accordion_calibration::windows::{WindowError, choose_windows};
use accordion_graphs::architecture::Architecture;
use sha2::{Digest, Sha256};
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows per call of a plain decoder: what is observed of a call is in memory at once.
const CALL_ROWS: usize = 512;

/// Rows of a call that go through the output matrix, whose results are far wider than all others.
const LOGIT_ROWS: usize = 32;

/// Tokens of a window that are read behind a compressed context.
const RUNNING_TOKENS: usize = 128;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeSettings {
    /// Windows of text, spread over all texts.
    pub windows: usize,
    /// Tokens per window, with what the tokenizer puts before every text.
    pub window_len: usize,
    /// Seed of the choice of windows.
    pub seed: u64,
    /// Which of these windows are read.
    pub part: Part,
    /// Whether the ranges of taps are measured too.
    pub taps: bool,
}

/// A share of the windows: `2/4` is the second of four. Tables of all shares merge into the table of all windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// From 1 on.
    number: usize,
    of: NonZeroUsize,
}

impl Part {
    /// All windows.
    pub const WHOLE: Self = Self { number: 1, of: NonZeroUsize::MIN };

    fn has(self, window: usize) -> bool {
        window % self.of == self.number - 1
    }
}

/// A word that is not a part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{found}' is not a part: expected K/N with K from 1 to N, as in 2/4")]
pub struct PartError {
    /// The word.
    found: String,
}

impl FromStr for Part {
    type Err = PartError;

    fn from_str(word: &str) -> Result<Self, PartError> {
        let part = || {
            let (number, of) = word.split_once('/')?;
            let (number, of): (usize, NonZeroUsize) = (number.parse().ok()?, of.parse().ok()?);
            (1..=of.get()).contains(&number).then_some(Self { number, of })
        };
        part().ok_or_else(|| PartError { found: word.to_owned() })
    }
}

/// A text to read.
#[derive(Debug, Clone)]
pub struct Text {
    /// How messages call it.
    pub name: String,
    /// The text.
    pub content: String,
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The bundle is not one whose ranges can be measured.
    #[error("ranges cannot be measured with this bundle: {problem}")]
    Bundle {
        /// What is wrong with it.
        problem: String,
    },
    /// A window would be longer or shorter than can be read.
    #[error("--window-len is {found}, expected {expected}")]
    WindowLength {
        /// What it was.
        found: usize,
        /// What it may be.
        expected: String,
    },
    /// A text or a part would have no window.
    #[error("{windows} windows are too few: {reason}")]
    TooFewWindows {
        /// Windows asked for.
        windows: usize,
        /// What they are too few for.
        reason: String,
    },
    /// A text is too short.
    #[error("{name}: {source}")]
    Windows {
        /// The text.
        name: String,
        /// What is wrong with it.
        source: WindowError,
    },
    /// A text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] CheckpointError),
    /// A graph failed, or computed what has no range.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// What was observed makes no table.
    #[error(transparent)]
    Estimate(#[from] EstimateError),
}

/// Tokens of a window where nothing else is asked for.
const WINDOW_LEN: usize = 2048;

/// Tokens per window with which the method of `bundle` does all that it does: HOMER merges, RCC and SharedLLM compress and
/// read on.
pub fn default_window_len(bundle: &Bundle) -> usize {
    match &bundle.manifest().method {
        Method::Homer { settings, tree_heights } if tree_heights.iter().any(|&height| height > 0) => {
            2 * settings.max_chunk_len
        }
        Method::Plain | Method::Homer { .. } => WINDOW_LEN.min(longest_text(bundle.architecture())),
        Method::Rcc { settings } => settings.window + RUNNING_TOKENS,
        Method::SharedLlm { settings } => 2 * settings.chunk_len,
    }
}

/// The longest text that the model reads as it is.
fn longest_text(arch: &Architecture) -> usize {
    arch.sliding_window().unwrap_or(usize::MAX).min(arch.max_positions())
}

/// Measures the ranges of the activations of `bundle` in the runtime of `loader`, while `compression` and its decoder read
/// windows of `texts`. `on_window` hears how many of how many windows are done.
///
/// A plain bundle's decoder reads whole windows. Else the window is compressed except for its last `RUNNING_TOKENS` at
/// most, which the decoder reads behind it.
///
/// The same arguments give the same table; the runtime's number of threads may change it in the last bits.
///
/// # Errors
///
/// A text is shorter than its windows need, the bundle cannot read such windows, a graph fails, or a linear layer is never
/// used.
pub fn calibrate<'b>(
    bundle: &'b Bundle,
    loader: Box<dyn Loader + 'b>,
    compression: &Compression,
    texts: &[Text],
    settings: RangeSettings,
    on_window: &mut dyn FnMut(usize, usize),
) -> Result<RangeTable, RangeError> {
    let layout = Layout::new(bundle, settings.taps)?;
    let tokenizer = Tokenizer::open(bundle.dir(), bundle.architecture().vocab_size())?;
    let leading = leading_ids(&tokenizer)?;
    check_window_len(bundle, compression, settings.window_len, leading.len())?;
    let chosen = choose(&tokenizer, texts, settings, leading.len())?;

    let observer = RangeObserver { estimator: RangeEstimator::new(layout.sites, layout.taps)?, values: layout.values };
    let observer = Arc::new(Mutex::new(observer));
    let mut engines = Engines::new(bundle, loader);
    engines.observe(Arc::clone(&observer) as _);

    let total = chosen.len();
    for (done, window) in chosen.into_iter().enumerate() {
        let mut open = observer.lock().unwrap_or_else(PoisonError::into_inner);
        open.estimator.begin_window(&window.text_sha256, window.start)?;
        drop(open);
        let ids = [&leading, &window.ids[..]].concat();
        match compression {
            Compression::Plain { .. } => read(&mut engines, &ids)?,
            _ => compress(&mut engines, compression, leading.len(), ids)?,
        }
        on_window(done + 1, total);
    }
    drop(engines);
    let observer =
        Arc::into_inner(observer).map(|observer| observer.into_inner().unwrap_or_else(PoisonError::into_inner));
    let Some(RangeObserver { estimator, .. }) = observer else { return Err(EstimateError::NoWindows.into()) };
    let method = serde_json::to_string(&StateMethod::from(compression)).unwrap_or_default();
    let tool = format!("accordion {}", env!("CARGO_PKG_VERSION"));
    Ok(estimator.finish(bundle.manifest().identity(), method, settings.window_len, tool)?)
}

/// The decoder over `ids`.
fn read(engines: &mut Engines<'_>, ids: &[u32]) -> Result<(), PipelineError> {
    let mut sequence = Sequence::new(engines, ids.len())?;
    for call in ids.chunks(CALL_ROWS) {
        sequence.forward(engines, call, call.len().min(LOGIT_ROWS))?;
    }
    Ok(())
}

/// Most of `ids` compressed, and the decoder over the rest.
fn compress(
    engines: &mut Engines<'_>,
    compression: &Compression,
    leading: usize,
    mut prefix: Vec<u32>,
) -> Result<(), PipelineError> {
    let mut context = prefix.split_off(leading);
    let running = RUNNING_TOKENS.min(context.len() / 2);
    let mut suffix = context.split_off(context.len() - running);
    // What the method makes of a prompt is its last token's; more of the decoder's rows are seen behind it.
    let behind = suffix.split_off(1);
    let prompt = PromptIds { prefix, context, suffix };
    let state = compression.compress(engines, &prompt, &mut |_, _| {})?;
    if !behind.is_empty() {
        let mut sequence = Sequence::continue_from(engines, &state, behind.len(), Continuation::Next)?;
        sequence.forward(engines, &behind, behind.len().min(LOGIT_ROWS))?;
    }
    Ok(())
}

fn check_window_len(
    bundle: &Bundle,
    compression: &Compression,
    found: usize,
    leading: usize,
) -> Result<(), RangeError> {
    let longest = match compression {
        Compression::Plain { .. } => longest_text(bundle.architecture()),
        // The plan of the method says what it cannot read.
        _ => usize::MAX,
    };
    // At least a token to compress and one to read.
    let shortest = leading + 2;
    if (shortest..=longest).contains(&found) {
        return Ok(());
    }
    let expected = if longest == usize::MAX {
        format!("at least {shortest}")
    } else {
        format!("{shortest} to {longest}, the longest text that the model can read")
    };
    Err(RangeError::WindowLength { found, expected })
}

/// A window of a text.
struct Window {
    text_sha256: String,
    /// Its first token.
    start: u64,
    ids: Vec<u32>,
}

/// The windows of the part that is to be read, in the order of the texts.
fn choose(
    tokenizer: &Tokenizer,
    texts: &[Text],
    settings: RangeSettings,
    leading: usize,
) -> Result<Vec<Window>, RangeError> {
    let RangeSettings { windows, window_len, seed, part, .. } = settings;
    let too_few = |reason: String| RangeError::TooFewWindows { windows, reason };
    if windows < texts.len() {
        return Err(too_few(format!("there are {} texts", texts.len())));
    }
    if part.of.get() > windows {
        return Err(too_few(format!("they are to be shared among {}", part.of)));
    }
    let mut chosen = Vec::new();
    let mut before = 0;
    for (i, text) in texts.iter().enumerate() {
        // As even as can be, the first texts getting what is left over.
        let count = windows / texts.len() + usize::from(i < windows % texts.len());
        let tokens = tokenizer.encode(&text.content, false)?;
        let ranges = choose_windows(tokens.len(), window_len - leading, count, seed)
            .map_err(|source| RangeError::Windows { name: text.name.clone(), source })?;
        let text_sha256 = format!("{:x}", Sha256::digest(&text.content));
        for (window, range) in (before..).zip(ranges) {
            if part.has(window) {
                let start = range.start as u64;
                chosen.push(Window { text_sha256: text_sha256.clone(), start, ids: tokens[range].to_vec() });
            }
        }
        before += count;
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn parts_share_all_windows() {
        let parts = ["1/3", "2/3", "3/3"].map(|word| word.parse::<Part>().unwrap());
        for window in 0..10 {
            assert_eq!(parts.iter().filter(|part| part.has(window)).count(), 1);
        }
        assert!((0..10).all(|window| Part::WHOLE.has(window)));
        for word in ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"] {
            assert!(word.parse::<Part>().unwrap_err().to_string().contains(&format!("'{word}'")), "{word}");
        }
    }
}
