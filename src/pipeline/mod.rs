//! From token ids to text, on whichever engine runs.

pub mod sampling;
pub mod stop;
