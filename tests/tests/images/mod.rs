//! Whole systems that are a router as soon as they run. `cargo xtask image test` makes them and runs these; without them
//! they skip and say so.

mod aws;
mod group;
mod lxc;
