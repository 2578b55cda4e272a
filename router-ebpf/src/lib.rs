//! Packet logic and map ABI of Sluice's eBPF programs, compiled for BPF and for the host alike.
//!
//! A packet goes through [`packet::parse`], [`decide::decide`] and [`rewrite::apply`]. All three
//! see the packet through [`packet::Frame`] and the maps through [`decide::Tables`]; the kernel's
//! implementations of these two traits are in the binary, the tests have their own. Every outcome
//! is a [`verdict::Verdict`].
//!
//! [`guard`] stands apart: what it judges is the underlay, and its program is an object of its own.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod abi;
pub mod answer;
#[cfg(not(target_arch = "bpf"))]
pub mod craft;
pub mod csum;
pub mod decide;
pub mod flow;
pub mod fragment;
pub mod guard;
pub mod icmp;
#[cfg(not(target_arch = "bpf"))]
pub mod memory;
pub mod mss;
pub mod packet;
pub mod policy;
pub mod rewrite;
#[cfg(test)]
mod site;
pub mod verdict;
#[cfg(not(target_arch = "bpf"))]
pub mod world;
