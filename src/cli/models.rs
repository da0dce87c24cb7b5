//! Models by name: what a CHECKPOINT argument may be.
