//! Peers whose packets are changed: those that reach IPv4 hosts by IPv6 (4via6), and those that know us by other
//! addresses.

use std::net::IpAddr;
use std::sync::Arc;

use crate::engine::counters::Counter;
use crate::engine::offload::readdress::readdress;
use crate::engine::offload::via::sites::Sites;
use crate::engine::offload::{ip, via};
use crate::engine::types::PeerSpec;
use crate::via::Ends;

/// What is changed of a peer's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edits {
    /// Its two addresses.
    via: Option<Ends>,
    /// Addresses of ours, each with the one by which the peer knows it.
    masquerade: Vec<(IpAddr, IpAddr)>,
}

/// What is to be done to a packet that goes to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Edit {
    /// It becomes IPv6.
    Translate(Ends),
    /// It comes from this address.
    From(IpAddr),
}

impl Edits {
    /// Those of a peer; mostly there are none.
    pub(crate) fn of(spec: &PeerSpec) -> Option<Arc<Self>> {
        let edits = Self {
            via: Ends::of(&spec.allowed_ips),
            masquerade: spec.masquerade.clone(),
        };
        (edits.via.is_some() || !edits.masquerade.is_empty()).then(|| Arc::new(edits))
    }

    /// Changes a packet that has come from the peer, whose source and length are right; gives its length then.
    pub(super) fn arrives(
        &self,
        packet: &mut [u8],
        sites: &Sites,
        mtu: usize,
        id: &mut u16,
    ) -> Result<usize, Counter> {
        if let Some(ends) = &self.via
            && let Some(host) = sites.host(packet)
        {
            // Nothing stands for its other addresses.
            if packet[8..24] != ends.v6.octets() {
                return Err(Counter::DropVia);
            }
            *id = id.wrapping_add(1);
            let length = via::to_v4(packet, ends, host, sites, mtu, *id);
            return length.ok_or(Counter::DropVia);
        }
        for (own, known) in &self.masquerade {
            if ip::destination(packet) == Some(*known) {
                let (octets, length) = octets(*own);
                readdress(packet, false, &octets[..length], false).ok_or(Counter::DropInner)?;
                break;
            }
        }
        Ok(packet.len())
    }

    /// What is to be done to a packet for the peer.
    pub(super) fn leaves(&self, packet: &[u8], sites: &Sites) -> Option<Edit> {
        if let Some(ends) = self.via
            && !sites.is_empty()
            && ip::destination(packet) == Some(IpAddr::V4(ends.v4))
        {
            return Some(Edit::Translate(ends));
        }
        if self.masquerade.is_empty() {
            return None;
        }
        let source = ip::source(packet)?;
        let mut known = self.masquerade.iter();
        let known = known.find(|(own, _)| *own == source)?.1;
        Some(Edit::From(known))
    }
}

/// An address as it stands in a packet, and its length in bytes.
pub(super) fn octets(address: IpAddr) -> ([u8; 16], usize) {
    match address {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            (octets, 4)
        }
        IpAddr::V6(address) => (address.octets(), 16),
    }
}
