//! Hostile input: every file here lies about something. It must be refused with a message that names the file and what
//! in it is wrong, without a panic and without an allocation driven by the lie.

mod bundle;
mod checkpoint;
mod gguf;
mod quantized;
mod recipe;
#[path = "../cli/sparse.rs"]
#[allow(dead_code, reason = "each target that shares the file uses its part")]
mod sparse;
mod state;
mod tokenizer;
mod trained;
