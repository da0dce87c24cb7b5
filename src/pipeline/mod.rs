//! Host code that walks a plan over engines: token ids -> context state -> decoded tokens. The same functions run
//! whichever runtime is behind the engines.

pub mod decode;
mod engines;
mod error;
pub mod homer;
pub mod plain;
pub mod sampling;
mod state;
pub mod stop;

pub use engines::Engines;
pub use error::PipelineError;
pub use state::ContextState;
