//! What becomes of decrypted packets: source check, congestion marks, coalescing.

use std::net::IpAddr;

use crate::engine::counters::{Counter, Counters};
use crate::engine::forward::port::Port;
use crate::engine::forward::routes::{PeerId, Routes};
use crate::engine::offload::coalesce::Coalescer;
use crate::engine::offload::ip;
use crate::wireguard::{Opened, Refused};

/// Takes opened packets of one peer: source check, ECN, coalescing.
pub(super) struct Inner<'a, P> {
    pub(super) id: PeerId,
    /// ECN bits of the underlay packets.
    pub(super) ecn: u8,
    /// The source that was found good last.
    pub(super) source: Option<IpAddr>,
    pub(super) routes: &'a Routes,
    pub(super) coalescer: &'a mut Coalescer,
    pub(super) counters: &'a Counters,
    pub(super) io: &'a mut P,
}

impl<P: Port> Inner<'_, P> {
    fn judge(&mut self, length: usize) -> Result<(), Counter> {
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
        Ok(())
    }
}

impl<P: Port> Opened for Inner<'_, P> {
    fn slot(&mut self) -> &mut [u8] {
        self.coalescer.slot()
    }

    fn packet(&mut self, length: usize) {
        if length == 0 {
            return;
        }
        match self.judge(length) {
            Ok(()) => {
                self.counters.add(Counter::RxPackets, 1);
                self.coalescer.push(length, self.io);
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
