//! The CUDA kernels of the fused operators, from Rust: finding the driver and the libraries, compiling, launching.
//!
//! Nothing is linked: the driver, NVRTC and cuBLASLt are loaded at run time, and a machine without them gets an error that
//! says what is missing. The kernels' sources, `plugins/*/kernel.cu`, are a part of the program.

mod append;
mod calls;
mod compile;
mod device;
mod error;
mod kernels;
pub(crate) mod libraries;
mod meter;
mod product;
mod transfer;

pub use append::{AppendRows, AppendedRow};
pub use calls::{Address, Element, Kernel, Launch, Refusal, StridedCompress, StridedRows, TopKPrune};
pub use compile::{Architecture, Source, cached, compile};
pub use device::{Buffer, Device, DeviceFacts, Graph, Moment};
pub use error::CudaError;
pub use kernels::{Kernels, Origin};
pub use meter::{DeviceTimes, Meter};
pub use product::CublasLt;
pub(crate) use transfer::{HostBuffer, Place, Rows};
