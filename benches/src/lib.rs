//! Benchmarks of Sluice: `cargo xtask bench`.
//!
//! A suite ([`case::Suite`]) is a list of cases; [`run`] measures them in interleaved rounds, and
//! [`report`] writes, draws and compares what came out. docs/performance.md says what is measured
//! and how, docs/bench-report.md documents `report.json`.

mod bpf;
pub mod case;
mod clear;
pub mod cpu;
mod device;
pub mod generator;
pub mod host;
pub mod mtu;
pub mod packet;
mod prog;
mod relay;
pub mod report;
pub mod run;
pub mod scale;
mod sockopt;
pub mod stats;
pub mod wireguard;

pub use clear::open_tun;

/// Every suite, in the order in which they run.
pub const SUITES: &[case::SuiteEntry] = &[
    prog::ENTRY,
    clear::ENTRY,
    wireguard::ENTRY,
    wireguard::junk::ENTRY,
    relay::ENTRY,
    mtu::ENTRY,
    scale::ENTRY,
];
