//! The command as users run it: arguments, output, exit codes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod verify;
