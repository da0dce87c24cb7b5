//! Hostile input: every file here lies about something. It must be refused with a message that names the file and what
//! in it is wrong, without a panic and without an allocation driven by the lie.

mod checkpoint;
mod gguf;
mod tokenizer;
