//! The significance bias of HOMER.
//!
//! HOMER prunes the context tokens to which the last token of a chunk attends least. Attention logits depend on
//! distance whatever the tokens are, so each raw score `max_h <q_h[L-1], k_h[j]> / sqrt(d)` (after rotation, before
//! softmax) is first reduced by its expectation at that layer and distance. A [`SignificanceEstimator`] measures this
//! expectation over windows of ordinary text run through the unpruned model; a [`SignificanceTable`] is the result.
//!
//! A table holds for one model under one rotary scaling, and says which ([`ModelIdentity`]).

mod estimator;
mod file;
mod smoothing;
mod table;

pub use crate::file::{TableError, TableProblem};
pub use crate::identity::ModelIdentity;
pub use estimator::{EstimateError, SignificanceEstimator};
pub use file::{FORMAT, METADATA_KEY};
pub use smoothing::Smoothing;
pub use table::{MismatchError, Provenance, SignificanceTable};

/// Most entries (layers times distances) a table may have: 128 layers of half a million distances.
pub const MAX_ENTRIES: usize = 1 << 26;
