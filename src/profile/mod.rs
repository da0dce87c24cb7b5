//! What a method costs: latency, memory, and how far from the machine's limits.
//!
//! - [`stats`]: repeated timing and its statistics.
//! - [`schema`]: the report that is printed, stored and drawn.

pub mod schema;
pub mod stats;
