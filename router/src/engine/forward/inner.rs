//! What becomes of decrypted packets: source check, congestion marks, coalescing.

use std::net::IpAddr;

use crate::engine::counters::{Counter, Counters};
use crate::engine::forward::edits::Edits;
use crate::engine::forward::inside::{self, Inside};
use crate::engine::forward::port::Port;
use crate::engine::forward::routes::{PeerId, Routes};
use crate::engine::offload::coalesce::Coalescer;
use crate::engine::offload::ip;
use crate::engine::offload::via::sites::Sites;
use crate::wireguard::{Opened, Refused};

/// Pings of a peer that are answered at once.
const ANSWERS: usize = 16;

/// Takes opened packets of one peer: source check, ECN, coalescing.
pub(super) struct Inner<'a, P> {
    pub(super) id: PeerId,
    /// ECN bits of the underlay packets.
    pub(super) ecn: u8,
    /// Messages that were authentic.
    pub(super) count: u64,
    /// The source that was found good last.
    pub(super) source: Option<IpAddr>,
    pub(super) routes: &'a Routes,
    /// What is changed of the peer's packets.
    pub(super) edits: Option<&'a Edits>,
    pub(super) sites: &'a Sites,
    /// The device's in bytes.
    pub(super) mtu: usize,
    /// Names packets that may be cut.
    pub(super) fragment: &'a mut u16,
    /// What is to be sent back.
    pub(super) answers: &'a mut Vec<Vec<u8>>,
    pub(super) coalescer: &'a mut Coalescer,
    pub(super) counters: &'a Counters,
    pub(super) io: &'a mut P,
}

impl<P: Port> Inner<'_, P> {
    /// Whether a packet may go on, and how long it is then.
    fn judge(&mut self, length: usize) -> Result<usize, Counter> {
        let packet = &mut self.coalescer.slot()[..length];
        let source = ip::checked_source(packet).ok_or(Counter::DropInner)?;
        if self.source != Some(source) {
            if self.routes.get(source) != Some(self.id) {
                return Err(Counter::DropSource);
            }
            self.source = Some(source);
        }
        if !ip::merge_ecn(packet, self.ecn) {
            return Err(Counter::DropCongestion);
        }
        match self.edits {
            None => Ok(length),
            Some(edits) => edits.arrives(packet, self.sites, self.mtu, self.fragment),
        }
    }

    /// Takes a packet that is neither TCP nor UDP.
    fn other(&mut self, length: usize) {
        if self.io.takes_inside() {
            let packet = &self.coalescer.slot()[..length];
            match inside::look(packet) {
                Inside::Ping(answer) if self.answers.len() < ANSWERS => {
                    self.answers.push(answer);
                    return self.counters.add(Counter::RxInside, 1);
                }
                Inside::Ping(_) => return self.counters.add(Counter::DropInside, 1),
                Inside::Message => {
                    let counter = self.io.inside(packet);
                    return self.counters.add(counter, 1);
                }
                Inside::Other => {}
            }
        }
        self.coalescer.pass(length, self.io);
    }
}

impl<P: Port> Opened for Inner<'_, P> {
    fn slot(&mut self) -> &mut [u8] {
        self.coalescer.slot()
    }

    fn packet(&mut self, length: usize) {
        self.count += 1;
        if length == 0 {
            return;
        }
        match self.judge(length) {
            Ok(length) => {
                self.counters.add(Counter::RxPackets, 1);
                if !self.coalescer.push(length, self.io) {
                    self.other(length);
                }
            }
            Err(why) => self.counters.add(why, 1),
        }
    }

    fn refused(&mut self, why: Refused) {
        let counter = match why {
            Refused::Auth => Counter::DropAuth,
            Refused::Replay => Counter::DropReplay,
            Refused::Expired => Counter::DropExpired,
            Refused::Inner => Counter::DropInner,
            Refused::Handshake => Counter::DropHandshake,
        };
        self.counters.add(counter, 1);
    }
}
