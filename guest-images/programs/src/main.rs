//! The multi-call guest program.
fn main() {}
