//! Packet logic and map ABI of Sluice's eBPF programs, compiled for BPF and for the host alike.
#![cfg_attr(target_arch = "bpf", no_std)]
