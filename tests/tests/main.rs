//! Integration tests, in one binary. Most need root: see `lab::test`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cloud;
mod ebpf;
mod images;
mod kernels;
mod lab_itself;
mod netlink;
mod router;
mod tailnet;
mod wireguard;
