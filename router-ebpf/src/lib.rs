//! Packet logic and map ABI of Sluice's eBPF programs, compiled for BPF and for the host alike.
//!
//! A packet goes through [`packet::parse`], [`decide::decide`] and [`rewrite::apply`]. All three
//! see the packet through [`frame::Frame`], the maps through [`tables::Tables`], and the rare steps through
//! [`steps::Steps`]; the kernel's implementations of these traits are in the binary, the host's are
//! [`memory::Memory`] and [`world::View`]. Every outcome is a [`verdict::Verdict`].
//!
//! No file needs one that needs it. From the ground up: [`verdict`], [`csum`], [`abi`]; [`frame`],
//! [`packet`]; [`forward`], [`entry`], [`tables`], [`steps`]; [`route`], [`opening`]; the concerns [`mss`],
//! [`fragment`], [`icmp`], [`answer`], [`flow`]; [`decide`] and [`rewrite`].
//!
//! [`guard`] stands apart: what it judges is the underlay, and its program is an object of its own.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod abi;
pub mod answer;
#[cfg(not(target_arch = "bpf"))]
pub mod craft;
pub mod csum;
pub mod decide;
pub mod entry;
pub mod flow;
pub mod forward;
pub mod fragment;
pub mod frame;
pub mod guard;
pub mod icmp;
#[cfg(not(target_arch = "bpf"))]
pub mod memory;
pub mod mss;
pub mod opening;
pub mod packet;
pub mod policy;
pub mod rewrite;
pub mod route;
#[cfg(test)]
mod site;
pub mod steps;
pub mod tables;
pub mod verdict;
#[cfg(not(target_arch = "bpf"))]
pub mod world;
