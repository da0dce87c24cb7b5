//! The `accordion` command.

fn main() {}
