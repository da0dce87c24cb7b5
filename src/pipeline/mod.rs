//! Host code that walks a plan over engines: token ids -> context state -> decoded tokens. The same functions run
//! whichever runtime is behind the engines.

mod cache;
pub mod compress;
pub mod decode;
mod engines;
mod error;
pub mod generate;
pub mod homer;
pub mod instruction;
pub mod observe;
pub mod plain;
pub mod prompt;
pub mod question;
pub mod ranges;
pub mod rcc;
mod reserved;
pub mod sampling;
pub mod sharedllm;
pub mod significance;
mod state;
pub mod state_file;
pub mod state_precision;
pub mod stepwise;
pub mod stop;

pub use engines::Engines;
pub use error::PipelineError;
pub use state::{ContextState, Injected, InjectedLayer, Scales};
