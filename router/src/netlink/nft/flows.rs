//! Connection tracking's flows (ctnetlink): to count them, and to end those that may not go on.
//!
//! Numbers are those of `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.

use std::net::IpAddr;

use super::Nft;
use crate::datapath::policy::NewFlow;
use crate::netlink::socket::Refusal;
use crate::netlink::wire::{attribute, field};
use crate::netlink::{Error, address_from};

const CTNETLINK: u16 = 1;
const CT_GET: u16 = 1;
const CT_DELETE: u16 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const PROTOCOL: u16 = 4;
const TIMEOUT: u16 = 7;
const ID: u16 = 12;
const ZONE: u16 = 18;
/// Flows per datagram; see the same of routes.
const FLOWS_PER_DATAGRAM: usize = 512;

/// A flow as connection tracking knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tracked {
    /// As its first packet was.
    pub(crate) first: NewFlow,
    /// Where its replies go: another address than its source if that is translated.
    pub(crate) external: IpAddr,
    /// Its number.
    pub(crate) id: u32,
    /// Of TCP the state of the connection (`enum tcp_conntrack`).
    pub(crate) tcp_state: Option<u8>,
    /// How long it lives on without a packet.
    pub(crate) seconds_left: u32,
}

/// What names a flow to the kernel.
struct Name {
    family: u8,
    tuple: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

impl Nft {
    /// Has `see` see all flows.
    pub(crate) fn flows(&mut self, mut see: impl FnMut(&Tracked)) -> Result<(), Error> {
        self.visit_flows(|flow, _| see(&flow))
    }

    fn visit_flows(&mut self, mut visit: impl FnMut(Tracked, Name)) -> Result<(), Error> {
        self.0
            .visit(
                CTNETLINK << 8 | CT_GET,
                |payload| payload.fixed(&[0; 4]),
                |message| {
                    if let Some((flow, name)) = read(message.payload) {
                        visit(flow, name);
                    }
                },
            )
            // Flows come and go while they are listed.
            .map(drop)
            .map_err(|refusal| Error::refused("list connection tracking's flows", refusal))
    }

    /// Ends the flows that `ended` picks, and returns how many there were. Their next packets count
    /// as those of new flows.
    pub(crate) fn end_flows(
        &mut self,
        mut ended: impl FnMut(&Tracked) -> bool,
    ) -> Result<usize, Error> {
        let mut names: Vec<Name> = Vec::new();
        self.visit_flows(|flow, name| {
            if ended(&flow) {
                names.push(name);
            }
        })?;
        for chunk in names.chunks(FLOWS_PER_DATAGRAM) {
            let mut batch = self.0.batch();
            for name in chunk {
                batch.push(CTNETLINK << 8 | CT_DELETE, 0, |payload| {
                    payload.fixed(&[name.family, 0, 0, 0]);
                    payload.nested(TUPLE_ORIGINAL, |tuple| tuple.fixed(&name.tuple));
                    payload.attribute(ID, &name.id);
                    if let Some(zone) = &name.zone {
                        payload.attribute(ZONE, zone);
                    }
                });
            }
            let refused = self.0.send(batch);
            let refused = refused.map_err(|refusal| Error::refused("end flows", refusal))?;
            // A flow may end by itself meanwhile.
            let serious = |(_, refusal): &(u32, Refusal)| refusal.errno != libc::ENOENT;
            if let Some((_, refusal)) = refused.into_iter().find(serious) {
                return Err(Error::refused("end a flow", refusal));
            }
        }
        Ok(names.len())
    }
}

fn read(payload: &[u8]) -> Option<(Tracked, Name)> {
    let family = *payload.first()?;
    let attributes = payload.get(4..)?;
    let tuple = attribute(attributes, TUPLE_ORIGINAL)?;
    let address = |tuple, v4, v6| -> Option<IpAddr> {
        let addresses = attribute(tuple, 1)?;
        address_from(attribute(addresses, v4).or_else(|| attribute(addresses, v6))?)
    };
    let ports = attribute(tuple, 2)?;
    let first = NewFlow {
        source: address(tuple, 1, 3)?,
        destination: address(tuple, 2, 4)?,
        protocol: *attribute(ports, 1)?.first()?,
        // Protocols without ports have none here either.
        port: attribute(ports, 3)
            .and_then(|port| field(port, 0))
            .map_or(0, u16::from_be_bytes),
    };
    let name = Name {
        family,
        tuple: tuple.to_vec(),
        id: attribute(attributes, ID)?.to_vec(),
        zone: attribute(attributes, ZONE).map(<[u8]>::to_vec),
    };
    let be32 = |kind| Some(u32::from_be_bytes(field(attribute(attributes, kind)?, 0)?));
    let tcp = attribute(attributes, PROTOCOL).and_then(|protocol| attribute(protocol, 1));
    let flow = Tracked {
        first,
        external: address(attribute(attributes, TUPLE_REPLY)?, 2, 4)?,
        id: be32(ID)?,
        tcp_state: tcp.and_then(|tcp| attribute(tcp, 1)?.first().copied()),
        // A flow of the kernel's flow table for offloads has none.
        seconds_left: be32(TIMEOUT).unwrap_or(u32::MAX),
    };
    Some((flow, name))
}
