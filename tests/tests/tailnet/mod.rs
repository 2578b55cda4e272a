//! The router's control client, without root: beside our own coordination server, and beside Tailscale's.

mod daemon;
mod derper;
mod node;
mod own;
mod real;
mod relay;
mod said;
mod scale;
mod task;
mod testcontrol;
mod ways;
