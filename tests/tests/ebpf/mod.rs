//! The eBPF programs in the kernel: what they make of packets (TEST_RUN), how they are built and
//! attached, and that what they redirect arrives.

pub(crate) mod arrival;
mod attach;
mod complexity;
mod contract;
mod denied;
mod differential;
mod fixture;
mod frames;
mod guard;
mod policy;
mod reject;
mod restart;
mod settled;
mod sweep;
mod verdicts;
