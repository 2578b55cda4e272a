//! Checksums that follow a change (RFC 1624), and the change of a transport header.

use crate::engine::offload::checksum;
use crate::engine::offload::ip::{ICMP, ICMPV6, TCP, UDP};

/// What goes out of a sum, and what comes in. Parts have an even length, and begin at an even offset.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Delta(u64);

impl Delta {
    pub(crate) fn without(self, bytes: &[u8]) -> Self {
        let [a, b] = checksum::fold(checksum::add(0, bytes));
        Self(self.0 + u64::from(u16::from_ne_bytes([!a, !b])))
    }

    pub(crate) fn with(self, bytes: &[u8]) -> Self {
        Self(checksum::add(self.0, bytes))
    }

    /// Changes a checksum that is whole.
    pub(crate) fn complete(self, field: &mut [u8]) {
        if let [a, b] = field {
            let sum = self.0 + u64::from(u16::from_ne_bytes([!*a, !*b]));
            [*a, *b] = checksum::finish(sum);
        }
    }

    /// Changes the sum of the pseudo-header that stands for a checksum which a device is to complete.
    pub(crate) fn partial(self, field: &mut [u8]) {
        if let [a, b] = field {
            [*a, *b] = checksum::fold(self.0 + u64::from(u16::from_ne_bytes([*a, *b])));
        }
    }
}

/// The change of the addresses around a transport header.
pub(crate) struct Readdress<'a> {
    /// Source and destination before, and after.
    pub(crate) old: &'a [u8],
    pub(crate) new: &'a [u8],
    /// Bytes of transport header and payload, as the sender has counted them.
    pub(crate) length: usize,
    pub(crate) to_v6: bool,
    /// The checksum is to be completed by a device.
    pub(crate) partial: bool,
}

impl Readdress<'_> {
    /// Has the header follow, as far as it is there, and gives the protocol on the other side. `None` for ICMP that
    /// is no echo.
    pub(crate) fn apply(&self, transport: &mut [u8], protocol: u8) -> Option<u8> {
        let delta = Delta::default().without(self.old).with(self.new);
        let field = match protocol {
            TCP => 16,
            UDP => 6,
            ICMP | ICMPV6 => return self.echo(transport, protocol),
            _ => return Some(protocol),
        };
        let Some(field) = transport.get_mut(field..field + 2) else {
            return Some(protocol);
        };
        if self.partial {
            delta.partial(field);
        } else if protocol != UDP || field != [0, 0] {
            delta.complete(field);
            if protocol == UDP && field == [0, 0] {
                field.fill(0xff);
            }
        }
        Some(protocol)
    }

    /// ICMPv6 sums up the addresses, ICMP does not.
    fn echo(&self, message: &mut [u8], protocol: u8) -> Option<u8> {
        let kind = match (*message.first()?, self.to_v6) {
            (8, true) => 128,
            (0, true) => 129,
            (128, false) => 8,
            (129, false) => 0,
            _ => return None,
        };
        if (protocol == ICMP) != self.to_v6 {
            return None;
        }
        let before = [message[0], *message.get(1)?];
        message[0] = kind;
        let length = (self.length as u32).to_be_bytes();
        let mut delta = Delta::default().without(&before).with(&message[..2]);
        delta = if self.to_v6 {
            delta.with(self.new).with(&length).with(&[0, ICMPV6])
        } else {
            delta
                .without(self.old)
                .without(&length)
                .without(&[0, ICMPV6])
        };
        if let Some(field) = message.get_mut(2..4) {
            delta.complete(field);
        }
        Some(if self.to_v6 { ICMPV6 } else { ICMP })
    }
}

const SYN: u8 = 2;
const MSS: u8 = 2;

/// Lowers the MSS of a TCP SYN to `limit`.
pub(crate) fn clamp(transport: &mut [u8], protocol: u8, limit: u16, partial: bool) {
    if protocol != TCP || transport.get(13).is_none_or(|flags| flags & SYN == 0) {
        return;
    }
    let end = usize::from(transport[12] >> 4) * 4;
    let mut at = 20;
    while at < end.min(transport.len()) {
        match (transport[at], transport.get(at + 1)) {
            (0, _) => return,
            (1, _) => at += 1,
            (MSS, Some(4)) if at + 4 <= end.min(transport.len()) => {
                let value = u16::from_be_bytes([transport[at + 2], transport[at + 3]]);
                if value <= limit {
                    return;
                }
                // The value may stand at an odd offset: the words around it are taken.
                let words = (at + 2) & !1..((at + 5) & !1).min(transport.len());
                let before = transport[words.clone()].to_vec();
                transport[at + 2..at + 4].copy_from_slice(&limit.to_be_bytes());
                let delta = Delta::default().without(&before).with(&transport[words]);
                if !partial {
                    delta.complete(&mut transport[16..18]);
                }
                return;
            }
            (_, Some(length)) if *length >= 2 => at += usize::from(*length),
            _ => return,
        }
    }
}
