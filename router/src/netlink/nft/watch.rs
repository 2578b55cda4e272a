//! Tells when tables of ours go.

use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};

use super::{DELTABLE, INET, NFTABLES, TABLE, TABLE_PREFIX};
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

    /// Waits until a table with a name of ours may have gone, by whatever hands: one that is
    /// replaced goes, too. Cancel safe. After an error it tells no more.
    pub(crate) async fn removed(&mut self) -> Result<(), Error> {
        loop {
            let mut input = Vec::with_capacity(DATAGRAM);
            match self.0.recv(&mut input).await {
                Ok(_) if names_ours(&input) => return Ok(()),
                Ok(_) => {}
                // Notices were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Err(error) => return Err(Error::io("watch nf_tables", &error)),
            }
        }
    }
}

/// Whether one of these messages tells of the end of a table with a name of ours.
fn names_ours(messages: &[u8]) -> bool {
    wire::messages(messages).any(|message| {
        let attributes = message.payload.get(4..).unwrap_or_default();
        let name = wire::attribute(attributes, TABLE).map(wire::text);
        message.kind == NFTABLES << 8 | DELTABLE
            && message.payload.first() == Some(&INET)
            && name.is_some_and(|name| name.starts_with(TABLE_PREFIX))
    })
}
