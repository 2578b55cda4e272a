//! Programs that let the kernel choose the worker: by receiver index on the underlay, by allowed
//! IPs on the TUN device. Both are hints: a worker hands over what is not its own.

mod bpf;
pub(crate) mod queues;
pub(crate) mod sockets;
