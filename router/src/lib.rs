//! Sluice's router daemon as a library. ARCHITECTURE.md has a line for each module and the way of a packet.

pub mod api;
pub mod cli;
pub mod cloud;
pub mod config;
mod container;
pub mod control;
pub mod core;
pub mod datapath;
pub mod engine;
mod files;
pub mod geneve;
pub mod netlink;
pub mod runtime;
pub mod tailnet;
pub mod telemetry;
pub mod uapi;
pub mod via;
pub mod wireguard;
