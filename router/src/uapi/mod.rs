//! WireGuard's cross-platform configuration protocol, which wg(8) speaks with every implementation
//! in user space: a socket `/var/run/wireguard/NAME.sock`, and on it any number of requests, each
//! lines of `key=value` that an empty line ends (<https://www.wireguard.com/xplatform/>).
//!
//! [`Parser`] takes the text apart, [`Interface`] is what it configures, [`State`] what it shows;
//! none of them does any I/O. [`Server`] is the socket, [`Device`] a plain WireGuard device that is
//! configured by nothing else.
//!
//! Where wireguard-go answers with an error number, so do we with the same one. Unlike there, a
//! `set` is applied whole or not at all: there, everything before the line in error stays.

mod device;
mod interface;
mod parse;
mod server;
mod state;

use std::fmt;

pub use device::{Device, Ended, Error as DeviceError, Options, run};
pub use interface::{Edited, Interface};
pub use parse::{AllowedIp, Parser, PeerSet, Request, Set};
pub use server::{Error as SocketError, Question, Server, socket_path};
pub use state::{PeerState, State};

/// The error number of a response; the numbers are Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// The configuration is not to be changed here.
    Permission = libc::EPERM as isize,
    /// The device did not do it.
    Io = libc::EIO as isize,
    /// An unknown key, or a value that is none of this key.
    Invalid = libc::EINVAL as isize,
    /// A line that is no `key=value`.
    Protocol = libc::EPROTO as isize,
    /// The port or the mark cannot be had.
    PortInUse = libc::EADDRINUSE as isize,
}

/// Why a request is not carried out. The reason holds no value that could be secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client is told.
    pub errno: Errno,
    /// What the log is told.
    pub reason: String,
}

impl Refusal {
    /// A refusal with this error number, for this reason.
    pub fn new(errno: Errno, reason: impl Into<String>) -> Self {
        Self {
            errno,
            reason: reason.into(),
        }
    }
}

/// The line that ends a response, with the empty line after it. wireguard-go negates the number,
/// and wg(8) relies on it.
pub fn ending(outcome: &Result<(), Refusal>) -> impl fmt::Display {
    let errno = outcome
        .as_ref()
        .err()
        .map_or(0, |refusal| refusal.errno as isize);
    fmt::from_fn(move |f| write!(f, "errno={}\n\n", -errno))
}
