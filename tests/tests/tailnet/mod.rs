//! The router's control client, without root: beside our own coordination server, and beside Tailscale's.

mod node;
mod own;
mod testcontrol;
mod ways;
