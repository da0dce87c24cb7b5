//! The CUDA kernels of the fused operators, from Rust.

mod calls;

pub use calls::{Address, Element, Kernel, Launch, Refusal, StridedCompress, StridedRows, TopKPrune};
