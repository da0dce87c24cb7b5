//! Fused operators of Accordion graphs.
