//! Tells when tables of ours go, and when others change theirs.

use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};

use super::{
    DELCHAIN, DELRULE, DELTABLE, INET, NEWCHAIN, NEWRULE, NEWTABLE, NFTABLES, TABLE, TABLE_PREFIX,
};
use crate::netlink::Error;
use crate::netlink::wire;

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// Room for one datagram: the kernel gathers notices up to a page, at most 8 KiB of it.
const DATAGRAM: usize = 16 * 1024;

/// A subscription to the changes of nf_tables in one network namespace.
pub(crate) struct Watch(TokioSocket);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Subscribes in the network namespace of the calling thread, within a tokio runtime.
    pub(crate) fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = TokioSocket::new(netlink_sys::protocols::NETLINK_NETFILTER)?;
            socket.socket_mut().bind_auto()?;
            socket.socket_mut().add_membership(GROUP)?;
            Ok(Self(socket))
        };
        open().map_err(|error| Error::io("watch nf_tables", &error))
    }

    /// Waits until tables, chains or rules have changed in a way that concerns us. Cancel safe. After
    /// an error it tells no more.
    pub(crate) async fn seen(&mut self) -> Result<Seen, Error> {
        loop {
            let mut input = Vec::with_capacity(DATAGRAM);
            match self.0.recv(&mut input).await {
                Ok(_) => {
                    let seen = look(&input);
                    if seen != Seen::default() {
                        return Ok(seen);
                    }
                }
                // Notices were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Seen {
                        removed: true,
                        others: true,
                    });
                }
                Err(error) => return Err(Error::io("watch nf_tables", &error)),
            }
        }
    }
}

/// What has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// A table with a name of ours may have gone, by whatever hands: one that is replaced goes, too.
    pub(crate) removed: bool,
    /// Others have changed chains or rules.
    pub(crate) others: bool,
}

/// What these messages tell.
fn look(messages: &[u8]) -> Seen {
    const STRUCTURE: [u16; 6] = [NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE];
    let mut seen = Seen::default();
    for message in wire::messages(messages) {
        let attributes = message.payload.get(4..).unwrap_or_default();
        let name = wire::attribute(attributes, TABLE).map(wire::text);
        let inet = message.payload.first() == Some(&INET);
        let ours = inet && name.is_some_and(|name| name.starts_with(TABLE_PREFIX));
        let kind = message.kind.wrapping_sub(NFTABLES << 8);
        if ours {
            seen.removed |= kind == DELTABLE;
        } else {
            seen.others |= STRUCTURE.contains(&kind);
        }
    }
    seen
}
