//! The command as its users meet it: exit codes, what goes to standard output and what to standard error, JSON.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod calibrate;
mod compress;
mod convert;
mod demo;
mod doctor;
mod engine;
mod eval;
mod export;
mod fetch;
mod inspect;
mod profile;
mod program;
mod quality;
mod report;
mod run;
mod selftest;
mod sharedllm;
mod sparse;
mod tiny;
mod usage;
mod verify;
