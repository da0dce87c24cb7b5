//! Engines: graphs loaded in a runtime.

pub(crate) mod dylib;
pub mod locate;
