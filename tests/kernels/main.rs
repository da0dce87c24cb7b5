//! The CUDA kernels, from the sources that GPUs get, run by the emulator in `plugins/cuda/emulator.h` and held to the CPU's
//! implementation. They need a C++ compiler (`CXX`, else `c++`), so they are ignored unless asked for:
//!
//! ```text
//! cargo test --release --test kernels -- --ignored
//! ```

#![allow(clippy::unwrap_used, clippy::panic)]

mod append;
mod compress;
mod guarded;
mod library;
mod prune;
mod selftest;
