//! The report page: what is in its source, and what a browser makes of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod browser;
mod markup;
mod sample;
mod structure;
mod text;
