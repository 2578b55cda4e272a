//! WireGuard's cross-platform configuration protocol, which wg(8) speaks with every implementation
//! in user space: a socket `/var/run/wireguard/NAME.sock`, and on it any number of requests, each
//! lines of `key=value` that an empty line ends (<https://www.wireguard.com/xplatform/>).
//!
//! [`Parser`] takes the text apart, [`Interface`] is what it configures, [`State`] what it shows;
//! none of them does any I/O. [`Server`] is the socket, [`Device`] a plain WireGuard device that is
//! configured by nothing else.
//!
//! Where wireguard-go answers with an error number, so do we with the same one, but for a port or a
//! mark that cannot be had: there it is always "address in use", here what the kernel said. Unlike
//! there, a `set` is applied whole or not at all: there, everything before the line in error stays.

mod device;
mod interface;
mod parse;
mod server;
mod state;

use std::fmt;

use crate::engine;

pub use device::{Device, Ended, Error as DeviceError, Options, run};
pub use interface::{Edited, Interface};
pub use parse::{AllowedIp, Parser, PeerSet, Request, Set};
pub use server::{Error as SocketError, Question, Server, socket_path};
pub use state::{PeerState, State};

/// The error number of a response; the numbers are Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// The configuration is not to be changed here.
    Permission,
    /// The device did not do it.
    Io,
    /// An unknown key, or a value that is none of this key.
    Invalid,
    /// A line that is no `key=value`.
    Protocol,
    /// What the kernel said when the port or the mark could not be had.
    Kernel(i32),
}

impl Errno {
    /// What a client is told of an error of the engine.
    pub fn of(error: &engine::Error) -> Self {
        let source = match error {
            engine::Error::Bind { source, .. } | engine::Error::Mark(source) => source,
            _ => return Self::Io,
        };
        source.raw_os_error().map_or(Self::Io, Self::Kernel)
    }

    /// The number, greater than 0.
    pub fn number(self) -> i32 {
        match self {
            Self::Permission => libc::EPERM,
            Self::Io => libc::EIO,
            Self::Invalid => libc::EINVAL,
            Self::Protocol => libc::EPROTO,
            Self::Kernel(number) => number,
        }
    }
}

/// Why a request is not carried out. The reason holds no value that could be secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client is told.
    pub errno: Errno,
    /// What the log is told.
    pub reason: String,
}

impl From<engine::Error> for Refusal {
    fn from(error: engine::Error) -> Self {
        Self::new(Errno::of(&error), error.to_string())
    }
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
        .map_or(0, |refusal| refusal.errno.number());
    fmt::from_fn(move |f| write!(f, "errno={}\n\n", -errno))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_client_is_told_what_the_kernel_said() {
        let said = |number| io::Error::from_raw_os_error(number);
        let bind = |source| engine::Error::Bind { port: 7, source };
        for (error, ends) in [
            (bind(said(libc::EADDRINUSE)), "errno=-98\n\n"),
            (bind(said(libc::EACCES)), "errno=-13\n\n"),
            (engine::Error::Mark(said(libc::EPERM)), "errno=-1\n\n"),
            (bind(io::Error::other("no number")), "errno=-5\n\n"),
            (engine::Error::Worker, "errno=-5\n\n"),
        ] {
            assert_eq!(ending(&Err(error.into())).to_string(), ends);
        }
        assert_eq!(ending(&Ok(())).to_string(), "errno=0\n\n");
    }
}
