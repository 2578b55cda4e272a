//! Connection tracking's flows (ctnetlink), to end those that may not go on.
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
}

/// What names a flow to the kernel.
struct Name {
    family: u8,
    tuple: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

impl Nft {
    /// Ends the flows that `ended` picks, and returns how many there were. Their next packets count
    /// as those of new flows.
    pub(crate) fn end_flows(
        &mut self,
        mut ended: impl FnMut(&Tracked) -> bool,
    ) -> Result<usize, Error> {
        let mut names: Vec<Name> = Vec::new();
        let failed = |refusal| Error::refused("list connection tracking's flows", refusal);
        self.0
            .visit(
                CTNETLINK << 8 | CT_GET,
                |payload| payload.fixed(&[0; 4]),
                |message| {
                    let picked = read(message.payload).filter(|(flow, _)| ended(flow));
                    names.extend(picked.map(|(_, name)| name));
                },
            )
            .map_err(failed)?;
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
            let refused = self.0.send(batch).map_err(failed)?;
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
    let external = address(attribute(attributes, TUPLE_REPLY)?, 2, 4)?;
    Some((Tracked { first, external }, name))
}
