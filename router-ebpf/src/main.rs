//! Sluice's eBPF programs.
fn main() {}
