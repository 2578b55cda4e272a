//! Which interface the kernel sends a packet out by.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::socket::{Refusal, Socket};
use super::wire;

/// `RTM_GETROUTE` (linux/rtnetlink.h).
const RTM_GETROUTE: u16 = 26;
/// `RTM_NEWROUTE`: the answer.
const RTM_NEWROUTE: u16 = 24;
/// Transport protocol and ports of the packet, which rules may look at.
const RTA_IP_PROTO: u16 = 27;
const RTA_SPORT: u16 = 28;
const RTA_DPORT: u16 = 29;
/// Bytes of a `struct rtmsg`.
const RTMSG: usize = 12;

/// Asks the kernel's routing, of the network namespace that it was made in.
#[derive(Debug)]
pub(crate) struct Outgoing(Socket);

impl Outgoing {
    /// Opens a socket in the network namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        Socket::open(libc::NETLINK_ROUTE as isize).map(Self)
    }

    /// The index of the interface by which a UDP datagram from `local` (and `port`, host byte order)
    /// with a firewall mark goes to `remote`.
    pub(crate) fn interface(
        &mut self,
        remote: SocketAddr,
        local: IpAddr,
        port: u16,
        mark: u32,
    ) -> Result<Option<u32>, Refusal> {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let (to, from) = (octets(remote.ip()), octets(local));
        let family = match remote {
            SocketAddr::V4(_) => libc::AF_INET,
            SocketAddr::V6(_) => libc::AF_INET6,
        };
        let mut found = None;
        self.0.ask(
            RTM_GETROUTE,
            |payload| {
                let bits = |octets: &[u8]| 8 * octets.len() as u8;
                let mut header = [0; RTMSG];
                header[..3].copy_from_slice(&[family as u8, bits(&to), bits(&from)]);
                payload.fixed(&header);
                payload.attribute(libc::RTA_DST, &to);
                payload.attribute(libc::RTA_SRC, &from);
                payload.u32(libc::RTA_MARK, mark);
                payload.attribute(RTA_IP_PROTO, &[libc::IPPROTO_UDP as u8]);
                payload.attribute(RTA_SPORT, &port.to_be_bytes());
                payload.attribute(RTA_DPORT, &remote.port().to_be_bytes());
            },
            |message| {
                if message.kind == RTM_NEWROUTE
                    && let Some(attributes) = message.payload.get(RTMSG..)
                {
                    found = wire::attribute(attributes, libc::RTA_OIF)
                        .and_then(|index| wire::field(index, 0))
                        .map(u32::from_ne_bytes);
                }
            },
        )?;
        Ok(found)
    }
}
