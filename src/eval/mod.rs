//! Evaluations: whether a model still finds, predicts and reproduces what was compressed.
//!
//! - A [`Task`] says what is asked: [`passkey`], [`needle`], [`perplexity`], [`reconstruct`]. It makes prompts and knows the
//!   answers; it runs nothing.
//! - A [`contender`] is a way of reading the context: the bundle's method, plain, or plain over the last tokens only.
//! - [`attempt`] puts one sample to one contender; [`session`] puts all of them to all, and keeps what is done in [`rows`].
//! - [`quality`] holds bundles of one model in several precisions against each other.
//! - [`score`] and [`stats`] judge, [`trace`] tells where a tree lost the answer, [`kept`] what it kept of the whole text, [`schema`] is what is stored and
//!   [`summary`] what is shown.
//!
//! Everything random comes from a seed, the task and the case ([`task::stream`]): the same command asks the same questions,
//! and a case asks the same of every contender, whatever other cases there are.

pub mod attempt;
pub mod contender;
mod error;
pub mod haystack;
pub mod kept;
pub mod needle;
pub mod passkey;
pub mod perplexity;
pub mod quality;
pub mod reconstruct;
pub mod rows;
pub mod schema;
pub mod score;
pub mod session;
pub mod stats;
pub mod summary;
pub mod task;
pub mod trace;

pub use error::EvalError;
pub use task::{Case, Goal, Sample, Task};
