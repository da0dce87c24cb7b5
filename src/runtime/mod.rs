//! Engines: graphs loaded in a runtime.

mod dylib;
pub mod locate;
