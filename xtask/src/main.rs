//! `cargo xtask`: Sluice's automation.
fn main() {}
