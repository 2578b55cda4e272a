//! Descriptors: the UDP sockets, the TUN queues, and what the kernel is asked about them.

pub(crate) mod detours;
pub(crate) mod exchange;
pub(crate) mod outlet;
pub(crate) mod poll;
pub(crate) mod steer;
pub(crate) mod tun;
pub(crate) mod udp;
pub(crate) mod udp_io;
