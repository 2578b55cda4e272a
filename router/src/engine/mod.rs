//! The packet engine: worker threads between the UDP sockets and the TUN queues.
//!
//! A worker runs to completion on epoll. It alone touches its sockets, its TUN queue, its buffers
//! and its peers, so no lock is taken on the way of a packet. [`Engine`] is the handle that the
//! rest of the daemon holds; it talks to the workers through their inboxes.
//!
//! Four wings, none of which knows one after it: `offload` (packets in memory), `forward` (what becomes
//! of packets and datagrams, without I/O), `io` (sockets and queues), and `control` (the handle). Between
//! the last two stands `worker`, one thread.

mod clock;
mod control;
mod counters;
mod error;
mod forward;
#[cfg(feature = "internals")]
pub mod internals;
mod io;
mod offload;
mod path;
mod types;
mod worker;

#[cfg(test)]
mod interop;
#[cfg(test)]
mod packets;

/// Batched datagrams for a thread that has sockets of its own beside the engine's.
pub(crate) mod datagrams {
    pub(crate) use super::forward::batch::{Endpoint, LONGEST, SEGMENTS};
    pub(crate) use super::io::poll::{Epoll, Waker};
    pub(crate) use super::io::udp::{alone, overflows};
    pub(crate) use super::io::udp_io::{Cut, Receiver, Sender, send_one};
}

pub use control::Engine;
pub use counters::Counter;
pub use error::{Error, Failure};
pub use forward::inside::ECHO;
pub use io::tun::usable as try_tun;
pub use offload::refusals::Refused;
pub use path::{Path, PathError, RelayId, Relayed};
pub use types::{
    Datagram, Features, IndexWatch, Nowhere, Offloads, Options, PeerChange, PeerSpec, PeerStats,
    Skipped,
};
