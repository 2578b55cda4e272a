//! Packets on their way to a peer: changed where they must be, cut, sealed, or kept until there is a session.

use std::time::Duration;

use super::Forwarder;
use crate::engine::counters::Counter;
use crate::engine::forward::edits::{Edit, octets};
use crate::engine::forward::peer::Amount;
use crate::engine::forward::port::Port;
use crate::engine::forward::routes::PeerId;
use crate::engine::offload::readdress::readdress;
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::offload::via::{self, Refused};
use crate::engine::offload::{ip, vnet};
use crate::via::Ends;
use crate::wireguard::Packets as _;

impl Forwarder {
    /// Takes a packet for a peer, of `length` bytes and [`SLACK`] more.
    pub(super) fn transmit_to(
        &mut self,
        id: PeerId,
        header: vnet::Header,
        buffer: &mut [u8],
        length: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let edits = self.peers.get(id).and_then(|peer| peer.edits.as_deref());
        match edits.and_then(|edits| edits.leaves(&buffer[..length], &self.sites)) {
            None => {}
            Some(Edit::Translate(ends)) => {
                return self.translate(id, &ends, header, &buffer[..length], now, io);
            }
            Some(Edit::From(address)) => {
                let (octets, width) = octets(address);
                let partial = header.checksum.is_some();
                if readdress(&mut buffer[..length], true, &octets[..width], partial).is_none() {
                    self.counters.add(Counter::DropTunRead, 1);
                    return;
                }
            }
        }
        self.seal(id, header, buffer, length, now, io);
    }

    /// Takes a packet for a peer that is to get it as IPv6.
    fn translate(
        &mut self,
        id: PeerId,
        ends: &Ends,
        header: vnet::Header,
        packet: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        let mut translated = std::mem::take(&mut self.translated);
        match via::to_v6(header, packet, ends, &self.sites, self.mtu, &mut translated) {
            Ok(header) => {
                let length = translated.len() - SLACK;
                if header.gso == vnet::Gso::None && length > self.mtu {
                    self.fragment = self.fragment.wrapping_add(1);
                    let name = self.fragment.into();
                    for mut piece in via::cut(&translated[..length], self.mtu, name) {
                        let length = piece.len();
                        piece.resize(length + SLACK, 0);
                        self.seal(id, vnet::Header::PLAIN, &mut piece, length, now, io);
                    }
                } else {
                    self.seal(id, header, &mut translated, length, now, io);
                }
            }
            Err(why) => {
                self.counters.add(Counter::DropVia, 1);
                if let Refused::TooBig(mtu) = why
                    && via::may_be_told(packet)
                    && let Some(answer) = via::too_big(packet, mtu)
                {
                    self.coalescer.write(&answer, io);
                }
            }
        }
        self.translated = translated;
    }

    fn seal(
        &mut self,
        id: PeerId,
        header: vnet::Header,
        buffer: &mut [u8],
        length: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(peer) = self.peers.get_mut(id) else {
            self.counters.add(Counter::DropNoPeer, 1);
            return;
        };
        let Some(to) = peer.destination() else {
            self.counters.add(Counter::DropNoEndpoint, 1);
            if let Some(destination) = ip::destination(buffer) {
                peer.is_nowhere(destination);
            }
            self.busy.extend(peer.tells_traffic(true, now));
            return;
        };
        let ecn = ip::ecn(buffer);
        let Ok(mut segments) = Segments::new(header, buffer, length, self.mtu) else {
            self.counters.add(Counter::DropTunRead, 1);
            return;
        };
        let gso = peer.gso(now);
        let tunnel = peer.tunnel(&self.local);
        if tunnel.ready(now) {
            let mut lane = self.batch.lane(io, to, Some(id), ecn, gso);
            let bytes = tunnel.seal(&mut segments, now, &mut lane);
            let packets = lane.count();
            peer.sent(Amount { packets, bytes }, now);
            peer.arm(id, &mut self.wheel, now);
            return;
        }
        while let Some(packet) = segments.next() {
            let dropped = self.staged.push(id, packet);
            self.counters.add(Counter::DropStaged, dropped);
        }
        self.initiate(id, now, io);
    }
}
