//! The `ftvmm` command.
fn main() {}
